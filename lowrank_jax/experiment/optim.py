"""Optimisers, learning-rate schedules and decay, put together from optax's parts."""

import re
from collections.abc import Sequence
from typing import Any

import optax

from lowrank_jax.decay import add_frobenius_decay, add_nuclear_decay
from lowrank_jax.kernel import is_low_rank
from lowrank_jax.paths import first_match, map_named, named_leaves
from lowrank_jax.text import nearest

OPTIMIZERS = ("sgd", "adamw", "rmsprop", "lars", "lamb")
KERNELS = r"(.*/)?(kernel|embedding)(/[uv])?"
"""Names of the parameters that multiply what a layer is fed: what decay and trust ratios are for."""
SCHEDULES = ("cosine", "step", "exponential", "constant")


def make_schedule(
    name: str,
    lr: float,
    *,
    total_steps: int,
    warmup: int = 0,
    step_at: Sequence[int] = (),
    step_every: int = 1,
    step_factor: float = 0.1,
) -> optax.Schedule:
    """The learning rate by step: a linear warm-up to `lr`, then the named schedule over what is left.

    Args:
      name: `cosine` to zero, `step` (times `step_factor` at each of `step_at`), `exponential` (times `step_factor` whenever
        `step_every` steps are over), or `constant`.
      lr: the highest rate.
      total_steps: the length of training.
      warmup: steps of linear growth from zero.
      step_at, step_every: in steps, counted from the start of training, warm-up included.
      step_factor: see above.
    """
    if name == "cosine":
        after = optax.cosine_decay_schedule(lr, max(1, total_steps - warmup))
    elif name == "step":
        after = optax.piecewise_constant_schedule(lr, {step - warmup: step_factor for step in step_at})
    elif name == "exponential":
        whole = optax.exponential_decay(lr, step_every, step_factor, staircase=True)
        after = lambda step: whole(step + warmup)  # noqa: E731
    else:
        after = optax.constant_schedule(lr)
    if not warmup:
        return after
    # The rate at step t is that of t + 1: the first update is not wasted on a rate of zero.
    return optax.join_schedules([lambda step: lr * (step + 1) / warmup, after], [warmup])


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    params: Any,
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    trust_coefficient: float = 0.001,
    clip_norm: float | None = None,
    weight_decay: float = 0.0,
    decay_rules: Sequence[tuple[str, float]] = ((".*", 1.0),),
    frobenius_decay: float = 0.0,
    nuclear_decay: float = 0.0,
) -> optax.GradientTransformation:
    """A gradient transformation.

    Decay joins the gradient in `sgd`, `rmsprop` and `lars`, and is decoupled from it in `adamw` and `lamb`.

    Args:
      name: one of `OPTIMIZERS`.  `rmsprop` is TensorFlow's: epsilon inside the root, mean squares that start at one, momentum
        of steps that the rate has multiplied.  `lars` and `lamb` scale the steps of kernels and embeddings, each factor by
        itself; biases, norm scales and positions move as in `sgd` and `adamw`.
      schedule: the learning rate.
      params: the parameters or their shapes, for the names that `decay_rules` match.
      momentum, nesterov: of sgd, rmsprop and lars.
      b1, b2, eps: of adamw and lamb; of rmsprop `b2`, the decay of the mean squares, and `eps`.
      trust_coefficient: of lars.
      clip_norm: bound on the global norm of the gradient.
      weight_decay: times the multiplier of the first rule that matches a parameter's name.
      decay_rules: `(path, multiplier)`; factors are called ".../kernel/u" and ".../kernel/v".
      frobenius_decay: decay of |UV|_F² of factor pairs, which then take no weight decay themselves.
      nuclear_decay: the same of |UV|_*, by its surrogate.

    Raises:
      ValueError: a rule matches no parameter, or a parameter is matched by no rule.
    """
    multipliers = decay_multipliers(params, decay_rules, skip_factors=frobenius_decay + nuclear_decay > 0)
    decays = [
        optax.add_decayed_weights(weight_decay * multiplier, mask=_mask(multipliers, multiplier))
        for multiplier in sorted(set(multipliers.values()))
        if weight_decay * multiplier
    ]
    if frobenius_decay:
        decays.append(add_frobenius_decay(frobenius_decay))
    if nuclear_decay:
        decays.append(add_nuclear_decay(nuclear_decay))
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    rate = optax.scale_by_learning_rate(schedule)
    if name == "sgd":
        core = [*decays, optax.trace(momentum, nesterov), rate]
    elif name == "rmsprop":
        core = [*decays, optax.rmsprop(schedule, b2, eps, initial_scale=1.0, momentum=momentum, nesterov=nesterov)]
    elif name == "lars":
        lars = optax.lars(
            schedule, trust_coefficient=trust_coefficient, trust_ratio_mask=_kernels, momentum=momentum, nesterov=nesterov
        )
        core = [*decays, lars]
    else:
        trust = [optax.masked(optax.scale_by_trust_ratio(), _kernels)] if name == "lamb" else []
        core = [optax.scale_by_adam(b1, b2, eps), *decays, *trust, rate]
    return optax.chain(*clip, *core)


def _kernels(params: Any) -> Any:
    return map_named(lambda name, _: re.fullmatch(KERNELS, name) is not None, params)


def decay_multipliers(params: Any, rules: Sequence[tuple[str, float]], *, skip_factors: bool) -> dict[str, float]:
    """The multiplier of weight decay for every parameter by name.

    Raises:
      ValueError: a rule matches no parameter, or a parameter is matched by no rule.
    """
    matches = first_match([path for path, _ in rules], list(named_leaves(params)))
    multipliers, uncovered = {}, []
    for name, index in matches.items():
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
