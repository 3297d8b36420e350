"""Interceptors of Linen modules, kept apart from the programs and the interceptors of others.

`nn.jit`, and any `jax.jit` inside a model, caches its trace.  It is used for later calls, also of another module of the class,
and also under other interceptors.  So the interceptors are part of the key under which JAX caches traces.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax

Interceptor = Callable[..., Any]

_traced_for: Any = jax.make_user_context(())  # the interceptors, the innermost one last, and modules
_stack: Any = nn.module._global_interceptor_stack  # flax has no public way to run a module unseen


@dataclasses.dataclass(frozen=True)
class Own:
    """One of our interceptors, as it stands in flax's stack."""

    interceptor: Interceptor

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.module.scope is None:  # a module without parameters, called outside of the model's tree
            return next_fun(*args, **kwargs)
        return self.interceptor(next_fun, args, kwargs, context)


@contextlib.contextmanager
def intercept(interceptor: Interceptor) -> Iterator[None]:
    """`nn.intercept_methods(interceptor)`, for what is traced within it alone."""
    with _traced_for((*_traced_for.value, interceptor)), nn.intercept_methods(Own(interceptor)):
        yield


@contextlib.contextmanager
def observe(observer: Interceptor) -> Iterator[None]:
    """The same for an interceptor that tells modules apart by their paths: no two of them share a trace."""

    def intercepted(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        with _traced_for((*_traced_for.value, context.module.path)):
            return observer(next_fun, args, kwargs, context)

    with intercept(intercepted):
        yield


def intercepts(interceptor: Interceptor) -> bool:
    """Whether an interceptor is at work already."""
    return Own(interceptor) in list(_stack)


def foreign_inside() -> bool:
    """Whether somebody else's interceptor was entered within one of ours."""
    own = [isinstance(interceptor, Own) for interceptor in _stack]  # the innermost one first
    return True in own and not all(own[: len(own) - own[::-1].index(True)])


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
