"""Optimisers, learning-rate schedules and decay, put together from optax's parts."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import optax

from lowrank_jax.decay import add_frobenius_decay, add_nuclear_decay
from lowrank_jax.experiment.guided import names_in_rules
from lowrank_jax.kernel import is_low_rank
from lowrank_jax.paths import first_match, map_named, named_leaves
from lowrank_jax.text import did_you_mean, nearest

if TYPE_CHECKING:  # the config's schema takes its names from here
    from lowrank_jax.experiment.config.schema import Duration, OptimConfig

OPTIMIZERS = ("sgd", "adamw", "rmsprop", "lars", "lamb")
KERNELS = r"(.*/)?(kernel|embedding)(/[uv])?"
"""Names of the parameters that multiply a layer's input, for which decay and trust ratios are meant."""
SCHEDULES = ("cosine", "step", "exponential", "constant")


def make_schedule(
    settings: "OptimConfig",
    lr: Any,
    *,
    total_steps: int,
    in_steps: Callable[["Duration"], int],
    extensions: Sequence[tuple[int, str]] = (),
) -> optax.Schedule:
    """The learning rate by step: a linear warm-up to `lr`, then the named schedule over the remaining steps.

    What a run was extended by leaves the rates before it as they were.

    Args:
      settings: `schedule` is `cosine` to zero, `step` (times `step_factor` at each of `step_at`), `exponential` (times
        `step_factor` after every `step_every`), or `constant`.  Durations count from the start of training, warm-up included.
      lr: the highest rate; it may be traced.
      total_steps: the length of training.
      in_steps: a duration in whole steps.
      extensions: the steps that training was to have before it was extended, and how the rate goes on from each: `restart`, the
        whole schedule anew, warm-up included, over the steps that were added; or `constant`, at the rate of the step before.

    Raises:
      ValueError: the schedule is unknown.
    """
    ends = [*(step for step, _ in extensions), total_steps]
    schedule = _make_phase(settings, lr, ends[0], in_steps)
    for (start, how), end in zip(extensions, ends[1:], strict=True):
        constant = how == "constant"
        after = optax.constant_schedule(schedule(start - 1)) if constant else _make_phase(settings, lr, end - start, in_steps)
        schedule = optax.join_schedules([schedule, after], [start])
    return schedule


def _make_phase(settings: "OptimConfig", lr: Any, total_steps: int, in_steps: Callable[["Duration"], int]) -> optax.Schedule:
    """The rate of training that was not extended, or of what was added."""
    warmup, factor = in_steps(settings.warmup), settings.step_factor
    if settings.schedule == "cosine":
        after = optax.cosine_decay_schedule(lr, max(1, total_steps - warmup))
    elif settings.schedule == "step":
        after = optax.piecewise_constant_schedule(lr, {in_steps(moment) - warmup: factor for moment in settings.step_at})
    elif settings.schedule == "exponential":
        whole = optax.exponential_decay(lr, max(1, in_steps(settings.step_every)), factor, staircase=True)
        after = lambda step: whole(step + warmup)  # noqa: E731
    elif settings.schedule == "constant":
        after = optax.constant_schedule(lr)
    else:
        raise ValueError(f"unknown schedule {settings.schedule!r}{did_you_mean(settings.schedule, SCHEDULES)}")
    if not warmup:
        return after
    # The rate at step t is that of t + 1: the first update is not wasted on a rate of zero.
    return optax.join_schedules([lambda step: lr * (step + 1) / warmup, after], [warmup])


def make_optimizer(
    settings: "OptimConfig", schedule: optax.Schedule, params: Any, also: Sequence[str] = ()
) -> optax.GradientTransformation:
    """The optimiser with clipping and decay.

    Decay is added to the gradient in `sgd`, `rmsprop` and `lars`, and decoupled from it in `adamw` and `lamb`.  `rmsprop` is
    TensorFlow's: epsilon inside the root, mean squares that start at one, and momentum of steps that the rate has multiplied.
    `lars` and `lamb` scale the steps of kernels and embeddings, each factor separately; biases, norm scales and positions move
    as in `sgd` and `adamw`.

    Args:
      settings: `momentum` and `nesterov` are of sgd, rmsprop and lars; `b1`, `b2` and `eps` of adamw and lamb; `b2`, the decay
        of the mean squares, and `eps` also of rmsprop; `trust_coefficient` of lars.  A parameter takes `weight_decay` times the
        multiplier of the first of `decay_rules` that matches its name; factors are called ".../kernel/u" and ".../kernel/v",
        and their guide in self-guided training ".../kernel".
        `frobenius_decay` is of |UV|_F² of factor pairs and `nuclear_decay` of |UV|_*, by its surrogate; with either, pairs
        take no weight decay.
      schedule: the learning rate.
      params: the parameters or their shapes, for their names.
      also: names that parameters may have in another phase of training, which rules may be for.

    Raises:
      ValueError: the optimiser is unknown, a rule matches no parameter, or a parameter is matched by no rule.
    """
    decays, rate = _decays(settings, params, also), optax.scale_by_learning_rate(schedule)
    clip = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []
    momentum = {"momentum": settings.momentum, "nesterov": settings.nesterov}
    if settings.name == "sgd":
        core = [*decays, optax.trace(settings.momentum, settings.nesterov), rate]
    elif settings.name == "rmsprop":
        core = [*decays, optax.rmsprop(schedule, settings.b2, settings.eps, initial_scale=1.0, **momentum)]
    elif settings.name == "lars":
        trust = {"trust_coefficient": settings.trust_coefficient, "trust_ratio_mask": _kernels}
        core = [*decays, optax.lars(schedule, **trust, **momentum)]
    elif settings.name in ("adamw", "lamb"):
        trust = [optax.masked(optax.scale_by_trust_ratio(), _kernels)] if settings.name == "lamb" else []
        core = [optax.scale_by_adam(settings.b1, settings.b2, settings.eps), *decays, *trust, rate]
    else:
        raise ValueError(f"unknown optimiser {settings.name!r}{did_you_mean(settings.name, OPTIMIZERS)}")
    return optax.chain(*clip, *core)


def _decays(settings: "OptimConfig", params: Any, also: Sequence[str]) -> list[optax.GradientTransformation]:
    skip_factors = settings.frobenius_decay + settings.nuclear_decay > 0
    multipliers = decay_multipliers(params, settings.decay_rules, skip_factors=skip_factors, also=also)
    decays = [
        optax.add_decayed_weights(settings.weight_decay * multiplier, mask=_mask(multipliers, multiplier))
        for multiplier in sorted(set(multipliers.values()))
        if settings.weight_decay * multiplier
    ]
    if settings.frobenius_decay:
        decays.append(add_frobenius_decay(settings.frobenius_decay))
    if settings.nuclear_decay:
        decays.append(optax.masked(add_nuclear_decay(settings.nuclear_decay), _no_guides))
    return decays


def _kernels(params: Any) -> Any:
    names = names_in_rules(params)
    return map_named(lambda name, _: re.fullmatch(KERNELS, names[name]) is not None, params)


def _no_guides(params: Any) -> Any:
    names = names_in_rules(params)
    return map_named(lambda name, _: names[name] == name, params)


def decay_multipliers(
    params: Any, rules: Sequence[tuple[str, float]], *, skip_factors: bool, also: Sequence[str] = ()
) -> dict[str, float]:
    """The multiplier of weight decay of every parameter, by name; `also` as in `make_optimizer`.

    Raises:
      ValueError: a rule matches no parameter, or a parameter is matched by no rule.
    """
    names = names_in_rules(params)
    matches = first_match([path for path, _ in rules], list(dict.fromkeys([*names.values(), *also])))
    multipliers, uncovered = {}, []
    for name, called in names.items():
        index = matches[called]
        if index is None:
            uncovered.append(name)
        else:
            multipliers[name] = rules[index][1]
    if uncovered:
        closest = nearest(uncovered[0], [path for path, _ in rules])
        raise ValueError(f"no decay rule matches {uncovered[0]!r} (and {len(uncovered) - 1} more); the nearest is {closest!r}")
    if skip_factors:
        for name, pair in named_leaves(params, is_leaf=is_low_rank).items():
            if is_low_rank(pair):
                multipliers.update({f"{name}/u": 0.0, f"{name}/v": 0.0})
    return multipliers


def _mask(multipliers: dict[str, float], multiplier: float):
    return lambda params: map_named(lambda name, _: multipliers[name] == multiplier, params)
