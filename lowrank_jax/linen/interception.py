"""Interceptors of Linen modules, kept apart from the programs and the interceptors of others.

`nn.jit`, and any `jax.jit` inside a model, keeps what it has traced: for the next call with the same shapes, of another module
of the class as well, whoever intercepts that.  So the interceptors are part of the key under which JAX keeps traced programs.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax

Interceptor = Callable[..., Any]

_traced_for: Any = jax.make_user_context(())  # the interceptors, the innermost one last, and modules
_stack: Any = nn.module._global_interceptor_stack  # flax has no public way to run a module unseen


@contextlib.contextmanager
def intercept(interceptor: Interceptor) -> Iterator[None]:
    """`nn.intercept_methods(interceptor)`, for what is traced within it alone."""
    with _traced_for((*_traced_for.value, interceptor)), nn.intercept_methods(interceptor):
        yield


@contextlib.contextmanager
def observe(observer: Interceptor) -> Iterator[None]:
    """The same for an interceptor that tells modules apart by their paths: no two of them share a program."""

    def intercepted(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        with _traced_for((*_traced_for.value, context.module.path)):
            return observer(next_fun, args, kwargs, context)

    with intercept(intercepted):
        yield


def intercepts(interceptor: Interceptor) -> bool:
    """Whether an interceptor is at work already."""
    return interceptor in _traced_for.value


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """No interceptor sees what runs within it: for layers that a layer on factors is made of."""
    hidden = []
    while _stack:
        hidden.append(_stack.pop())
    try:
        yield
    finally:
        for interceptor in reversed(hidden):
            _stack.push(interceptor)
