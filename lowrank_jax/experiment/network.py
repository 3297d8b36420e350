"""A model as its author wrote it: how it is made, and how it is called.

Everything that runs a network runs it through `Network`: the check of a config, the first weights, training, evaluation,
reports and estimates.  What the check accepts is what trains.
"""

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.errors import ScopeCollectionNotFound, ScopeVariableNotFoundError

from lowrank_jax import models
from lowrank_jax.linen.layers import apply
from lowrank_jax.linen.named_axes import in_named_axes
from lowrank_jax.paths import named_leaves
from lowrank_jax.text import did_you_mean, first_line

AUTO, NONE = "auto", "none"

_TRAINING = ("train", "training", "is_training")
_EVALUATING = ("deterministic",)
_OUTPUTS = ("num_classes", "num_outputs", "features")
_NOT = "not "
_OF_TELLING = re.compile(r'Cannot update variable|needs PRNG for "dropout"|unexpected keyword argument|missing \d+ required')


@dataclasses.dataclass(frozen=True)
class Network:
    """A Linen module that is called on a batch of inputs, and told whether it trains in its own words.

    Attributes:
      module: the Linen module.
      train_argument: the argument that says whether it trains: "train", "not deterministic" for one that says the opposite,
        "none" if it has none, or "auto" to read it from the signature of the module's `__call__`.
    """

    module: nn.Module
    train_argument: str = AUTO

    def flags(self, train: bool) -> dict[str, bool]:
        """The keyword arguments besides the inputs: at most the one that says whether it trains."""
        argument = self._argument()
        if argument == NONE:
            return {}
        return {argument.removeprefix(_NOT): train != argument.startswith(_NOT)}

    def _argument(self) -> str:
        """The argument that says whether it trains, or "none"."""
        return train_argument(type(self.module)) if self.train_argument == AUTO else self.train_argument

    def problem(self) -> str | None:
        """Why it cannot be told whether it trains."""
        cls = type(self.module)
        try:
            name = self._argument().removeprefix(_NOT)
        except ValueError as error:
            return f'"{AUTO}", but {error}'
        if name == NONE or name in _named(cls) or _takes_keywords(cls):
            return None
        return f"{self.train_argument!r}; {cls.__name__}.__call__ takes no such argument{did_you_mean(name, _named(cls))}"

    def hint(self, said: str) -> str:
        """What to add to an error that may come of what it is told."""
        return (
            f'; model.train_argument is how it is told whether it trains, here "{self._argument()}"'
            if _OF_TELLING.search(said)
            else ""
        )

    def init(self, rngs: Any, inputs: jax.Array) -> Any:
        """The dense network's variables, drawn by its own initialisers.

        As it is called without being told anything; where it has to be told, it does not train.
        """
        flags: Any = {} if self._knows_itself() else self.flags(train=False)
        return in_named_axes(lambda: self.module.init(rngs, inputs, **flags))

    def apply(self, variables: Any, inputs: jax.Array, *, train: bool, **options: Any) -> Any:
        """What the network gives for a batch; kernels may be factored.

        Args:
          variables: by collection.
          inputs: `[batch, ...]`, normalised.
          train: whether it trains.
          options: `rngs` and `mutable`, as for a module's `apply`.
        """
        flags = self.flags(train)
        return in_named_axes(lambda: apply(self.module, variables, inputs, **flags, **options))

    def step(self, variables: Any, inputs: jax.Array, dropout: jax.Array) -> tuple[Any, Any]:
        """The same in training: the outputs, and every collection but `params` as it is after the call."""
        written = [name for name in variables if name != "params"]
        return self.apply(variables, inputs, train=True, mutable=written, rngs={"dropout": dropout})

    def state(self, variables: Any, inputs: Any) -> dict[str, Any]:
        """The collections besides `params` and `batch_stats` that carry state from step to step: those that it reads.

        What a module sows is an output: where its collection is not there, it is not written, and nothing is missed.
        """
        others = [name for name in variables if name not in ("params", "batch_stats")]
        return {name: variables[name] for name in others if self._reads(variables, name, inputs)}

    def _reads(self, variables: Any, name: str, inputs: Any) -> bool:
        """Whether it misses a collection that is not there."""
        rest = {other: value for other, value in variables.items() if other != name}
        try:
            jax.eval_shape(self.step, rest, inputs, jax.random.key(0))
        except (ScopeCollectionNotFound, ScopeVariableNotFoundError):
            return True
        except Exception:  # of a model that takes no single input in training; `trace` says so if it is wrong
            return True
        return False

    def trace(self, one: jax.ShapeDtypeStruct, two: jax.ShapeDtypeStruct) -> "Traced":
        """What it gives in training and in evaluation, as shapes.  Nothing is computed.

        Args:
          one, two: one input, on which it is initialised, and a batch of two.

        Raises:
          Exception: whatever the model raises when it is initialised.
          ValueError: it fails in training or evaluation.
        """
        variables = dict(jax.eval_shape(lambda rng, inputs: self.init(rng, inputs), jax.random.key(0), one))
        params, batch_stats = nn.meta.unbox(variables.get("params", {})), variables.get("batch_stats", {})
        state = self.state({**variables, "params": params}, one)
        carried = {"params": params, "batch_stats": batch_stats, **state}
        evaluation = _traced("in evaluation", lambda *given: self.apply(*given, train=False), carried, two)
        training, after = _traced("in training", self.step, carried, two, jax.random.key(0))
        return Traced(params, training, evaluation, tuple(_changes(carried, after)))

    def _knows_itself(self) -> bool:
        """Whether it need not be told whether it trains."""
        parameters = inspect.signature(type(self.module).__call__).parameters
        return all(name in parameters and isinstance(parameters[name].default, bool) for name in self.flags(train=False))


@dataclasses.dataclass(frozen=True)
class Traced:
    """What a model gives for a batch of two, as shapes.

    Attributes:
      params: its parameters.
      training, evaluation: its outputs.
      problems: why what it carries from step to step cannot be carried.
    """

    params: Any
    training: Any
    evaluation: Any
    problems: tuple[str, ...]


def _traced(when: str, run: Callable[..., Any], *args: Any) -> Any:
    try:
        return jax.eval_shape(run, *args)
    except Exception as error:
        raise ValueError(f"{when}: {first_line(error)}") from error


def _changes(carried: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The arrays that a step makes, drops, or gives another shape or type."""
    old = named_leaves({name: value for name, value in carried.items() if name != "params"})
    new = named_leaves(dict(after))
    found = []
    for name in dict.fromkeys([*old, *new]):
        before, later = (_kind(leaves.get(name)) for leaves in (old, new))
        if before != later:
            found.append(
                f"model: {name!r}, which it carries from step to step, is {before} at first and {later} after a batch of two;"
                " it must stay what it is, whatever the batch"
            )
    return found


def _kind(leaf: Any) -> str:
    return "missing" if leaf is None else f"{leaf.dtype} {list(leaf.shape)}"


_EMPTY = inspect.Parameter.empty
_KEYWORDS = inspect.Parameter.VAR_KEYWORD
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@functools.cache
def train_argument(cls: type[nn.Module]) -> str:
    """What of a module's `__call__` says whether it trains: its name, after "not " if it says the opposite; or "none".

    Raises:
      ValueError: several arguments are called as if they did, or none, but there is one that may.
    """
    named = _named(cls)
    found = [name for name in (*_TRAINING, *_EVALUATING) if name in named]
    if len(found) > 1:
        raise ValueError(f"{cls.__name__} takes both {' and '.join(found)}; set it to the one that says whether it trains")
    if found:
        return f"{_NOT}{found[0]}" if found[0] in _EVALUATING else found[0]
    for name, parameter in named.items():
        if isinstance(parameter.default, bool) or _admits(parameter.annotation, bool):
            raise ValueError(f'{cls.__name__} takes {name}; set it to "{name}", "{_NOT}{name}" or "{NONE}"')
    # One that passes all keywords on is taken for one that passes on this.
    if _takes_keywords(cls):
        return _TRAINING[0]
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if _LIKE_TRAINING.search(field.name) and (isinstance(field.default, bool) or _admits(field.type, bool)):
            advice = f'make it an argument of __call__, or set "{NONE}" to leave it as it is'
            raise ValueError(f"{cls.__name__} has the setting {field.name}, which stays the same in evaluation; {advice}")
    return NONE


_LIKE_TRAINING = re.compile("train|determin|eval|infer|running_average")
"""What a setting is called that switches between training and evaluation; others switch parts of the network."""


def _named(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The arguments of `__call__` after the inputs, by name."""
    _, *others = inspect.signature(cls.__call__).parameters.values()
    if others and others[0].kind != inspect.Parameter.KEYWORD_ONLY:
        del others[0]
    return {parameter.name: parameter for parameter in others if parameter.kind in _BY_NAME}


def _takes_keywords(cls: type[nn.Module]) -> bool:
    return any(parameter.kind == _KEYWORDS for parameter in inspect.signature(cls.__call__).parameters.values())


def train_argument_problem(value: str) -> str | None:
    """What is wrong with a value of `Network.train_argument`."""
    if value.removeprefix(_NOT).isidentifier():
        return None
    return 'must be "auto", "none", the name of an argument, or "not " and the name of one that says the opposite'


def outputs_argument_problem(value: str) -> str | None:
    """What is wrong with the name of the argument for the number of outputs."""
    return None if value.isidentifier() else 'must be "auto", "none", or the name of an argument'


@dataclasses.dataclass(frozen=True)
class Constructor:
    """What makes a module of a config's settings.

    Attributes:
      name: that `lowrank_jax.models` knows, or of code.
      outputs_argument: what it calls the number of outputs; "auto" to read it from its signature, "none" for a model that is
        taken as it is.
      folder: where code is looked up; see `named_code.import_attribute`.
    """

    name: str
    outputs_argument: str = AUTO
    folder: str | None = None

    def make(self, outputs: int, settings: Mapping[str, Any]) -> nn.Module:
        """The module, not initialised.

        Raises:
          ValueError, TypeError: it cannot be made; the message says why.
        """
        argument = self.argument()
        number = {} if argument == NONE else {argument: outputs}
        return models.make(self.name, {**number, **settings}, self.folder)

    def argument(self) -> str:
        """The name of the argument for the number of outputs, or "none".

        Raises:
          ValueError: none is known.
        """
        if self.outputs_argument != AUTO:
            return self.outputs_argument
        parameters = self._parameters()
        found = [name for name in _OUTPUTS if name in parameters and _may_be_a_number(parameters[name].annotation)]
        if found or self._takes_any():
            return found[0] if found else _OUTPUTS[0]
        known = f"{', '.join(_OUTPUTS[:-1])} or {_OUTPUTS[-1]}"
        advice = 'name its argument for the number of outputs, or set "none" if its outputs are what the objective takes'
        raise ValueError(f'"auto", but {self.name} takes no {known}; {advice}')

    def types(self) -> dict[str, Any] | None:
        """The model's own settings and their types; None where they are not known, as of a function."""
        found = models.settings(self.name, self.folder)
        return found and {key: hint for key, hint in found.items() if key not in (self.argument(), "dtype")}

    def problems(self, settings: Mapping[str, Any], dtype: str) -> list[str]:
        """What is wrong with the names in a config, each with its key; values are checked by their `types`."""
        try:
            models.constructor(self.name, self.folder)
        except ValueError as error:
            return [f"model.name: {error}"]
        try:
            argument = self.argument()
        except ValueError as error:
            return [f"model.outputs_argument: {error}"]
        if argument != NONE and argument not in self._parameters() and not self._takes_any():
            proposal = did_you_mean(argument, self._parameters())
            return [f"model.outputs_argument: {argument!r}; {self.name} has no such setting{proposal}"]
        problems = []
        if argument in settings:
            advice = "leave it out, or set model.outputs_argument"
            problems.append(f"model.kwargs.{argument}: it is the number of outputs, which the data set gives; {advice}")
        if dtype != "float32" and "dtype" not in self._parameters() and not self._takes_any():
            problems.append(f"model.dtype: {dtype}; {self.name} takes no dtype, by which it would be told")
        types = self.types()
        if types is None:
            return problems
        unknown = [key for key in settings if key not in types and key != argument]
        return problems + [f"model.kwargs.{key}: {self.name} has no such setting{did_you_mean(key, types)}" for key in unknown]

    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        try:
            return inspect.signature(models.constructor(self.name, self.folder)).parameters
        except (TypeError, ValueError):  # of built-in code
            return {}

    def _takes_any(self) -> bool:
        """Whether it takes all keywords."""
        return any(parameter.kind == _KEYWORDS for parameter in self._parameters().values())


def _may_be_a_number(annotation: Any) -> bool:
    """Whether an argument with this annotation can be a whole number, as far as is known."""
    return annotation in (_EMPTY, Any, "Any", "typing.Any") or _admits(annotation, int)


def _admits(annotation: Any, kind: type) -> bool:
    """Whether an annotation is this type, or a union with it."""
    if isinstance(annotation, str):
        name = kind.__name__
        return annotation in (name, f"{name} | None", f"Optional[{name}]", f"typing.Optional[{name}]")
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return annotation is kind or (union and kind in typing.get_args(annotation))
