import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_jax.experiment.config.schema import Duration, OptimConfig
from lowrank_jax.experiment.optim import decay_multipliers, make_optimizer, make_schedule
from lowrank_jax.kernel import LowRankKernel

PARAMS = {
    "dense": {"kernel": LowRankKernel(np.full((4, 2), 2.0, "f"), np.full((2, 3), 3.0, "f")), "bias": np.ones(3, "f")},
    "head": {"kernel": np.full((3, 2), 5.0, "f"), "bias": np.ones(2, "f")},
}
RULES = ((r"(.*/)?kernel(/[uv])?", 1.0), (".*", 0.0))


def updated(gradient=0.0, steps=1, **settings):
    """The parameters after some steps along a gradient that is the same everywhere."""
    optimizer = make_optimizer(OptimConfig(**{"decay_rules": RULES, **settings}), optax.constant_schedule(0.1), PARAMS)
    return stepped(optimizer, gradient, steps)


def stepped(optimizer, gradient, steps):
    @jax.jit
    def run(params):
        state = optimizer.init(params)
        for _ in range(steps):
            updates, state = optimizer.update(jax.tree.map(lambda x: jnp.full_like(x, gradient), params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    return jax.device_get(run(PARAMS))


def rates(schedule, steps, *, warmup=10, step_at=(), step_every=1, **settings):
    """The learning rates of some steps, of 100 in all and 0.4 at most."""
    durations = {"warmup": warmup, "step_every": step_every}
    settings |= {name: Duration(steps, "step") for name, steps in durations.items()}
    settings["step_at"] = tuple(Duration(step, "step") for step in step_at)
    config = OptimConfig(schedule=schedule, **settings)
    return jax.vmap(make_schedule(config, 0.4, total_steps=100, in_steps=lambda d: d.steps(1, 1)))(jnp.array(steps))


def test_schedules_warm_up_and_come_down():
    cosine = rates("cosine", [0, 9, 10, 55, 100])
    np.testing.assert_allclose(cosine, [0.04, 0.4, 0.4, 0.2, 0], atol=1e-6)
    step = rates("step", [0, 29, 31, 61], step_at=[30, 60], step_factor=0.1)
    np.testing.assert_allclose(step, [0.04, 0.4, 0.04, 0.004], rtol=1e-5)
    exponential = rates("exponential", [4, 9, 10, 23, 24, 48], step_every=24, step_factor=0.5)
    np.testing.assert_allclose(exponential, [0.2, 0.4, 0.4, 0.4, 0.2, 0.1], rtol=1e-5)
    np.testing.assert_allclose(rates("constant", [0, 99], warmup=0), 0.4, rtol=1e-6)


def extended_rates(how, schedule="cosine", **settings):
    """The rates of 250 steps: 100 with a warm-up of 10, and 150 by which they were extended."""
    config = OptimConfig(schedule=schedule, warmup=Duration(10, "step"), **settings)
    made = make_schedule(config, 0.4, total_steps=250, in_steps=lambda d: d.steps(1, 1), extensions=[(100, how)])
    return np.asarray(jax.vmap(made)(jnp.arange(250)))


def written_out(steps):
    """A warm-up of 10 steps to 0.4, and half a cosine to zero over the others."""
    t = np.arange(steps)
    return np.where(t < 10, 0.4 * (t + 1) / 10, 0.2 * (1 + np.cos(np.pi * (t - 10) / (steps - 10))))


def test_an_extension_begins_the_schedule_anew_and_leaves_the_rates_before():
    found = extended_rates("restart")
    np.testing.assert_allclose(found, [*written_out(100), *written_out(150)], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found[:100], rates("cosine", range(100)))


def test_an_extension_goes_on_at_the_rate_of_the_last_step():
    found = extended_rates("constant")
    np.testing.assert_allclose(found[100:], written_out(100)[-1], rtol=1e-3)
    np.testing.assert_array_equal(found[100:], found[99])
    stepped = extended_rates("constant", "step", step_at=(Duration(50, "step"),), step_factor=0.5)
    np.testing.assert_allclose(stepped[[49, 51, 99, 100, 249]], [0.4, 0.2, 0.2, 0.2, 0.2], rtol=1e-6)


def test_an_extension_of_an_extension():
    config = OptimConfig(schedule="exponential", step_every=Duration(1, "step"), step_factor=0.5)
    extensions = [(3, "restart"), (5, "constant")]
    made = make_schedule(config, 1.0, total_steps=8, in_steps=lambda d: d.steps(1, 1), extensions=extensions)
    np.testing.assert_allclose([made(step) for step in range(8)], [1, 0.5, 0.25, 1, 0.5, 0.5, 0.5, 0.5])


def test_sgd_is_the_textbooks():
    # Nesterov: v = mu v + g, and the step is along mu v + g.
    params = updated(gradient=1.0, steps=2, momentum=0.9, nesterov=True)
    velocity, theta = 0.0, 1.0
    for _ in range(2):
        velocity = 0.9 * velocity + 1
        theta -= 0.1 * (0.9 * velocity + 1)
    np.testing.assert_allclose(params["head"]["bias"], theta, rtol=1e-6)
    plain = updated(gradient=1.0, steps=2, momentum=0.9, nesterov=False)
    np.testing.assert_allclose(plain["head"]["bias"], 1 - 0.1 * (1 + 1.9), rtol=1e-6)


def test_adamw_is_optaxs():
    ours = updated(gradient=0.3, steps=3, name="adamw", weight_decay=0.1, decay_rules=((".*", 1.0),))
    theirs = stepped(optax.adamw(0.1, weight_decay=0.1), 0.3, 3)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_rmsprop_is_tensorflows():
    import tensorflow as tf

    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 2)).astype(np.float32)}
    gradients = [rng.normal(size=(3, 2)).astype(np.float32) for _ in range(6)]
    settings = OptimConfig("rmsprop", momentum=0.9, nesterov=False, b2=0.9, eps=1e-3, decay_rules=((".*", 0.0),))
    optimizer = make_optimizer(settings, optax.constant_schedule(0.05), params)
    state, ours, update = optimizer.init(params), params, jax.jit(optimizer.update)
    variable, square, momentum = (tf.Variable(value) for value in (params["w"], np.ones((3, 2), "f"), np.zeros((3, 2), "f")))
    for gradient in gradients:
        updates, state = update({"w": gradient}, state, ours)
        ours = {"w": np.asarray(ours["w"] + updates["w"])}
        tf.raw_ops.ResourceApplyRMSProp(
            var=variable.handle,
            ms=square.handle,
            mom=momentum.handle,
            lr=0.05,
            rho=0.9,
            momentum=0.9,
            epsilon=1e-3,
            grad=gradient,
        )
        np.testing.assert_allclose(ours["w"], variable.numpy(), rtol=1e-5)


def test_lars_scales_every_matrix_by_its_trust_ratio_and_leaves_vectors_alone():
    settings = {"momentum": 0.0, "trust_coefficient": 0.01, "weight_decay": 0.5, "decay_rules": RULES}
    params = updated(gradient=1.0, name="lars", **settings)
    for before, after in (
        (5.0, params["head"]["kernel"]),
        (2.0, params["dense"]["kernel"].u),
        (3.0, params["dense"]["kernel"].v),
    ):
        gradient = 1 + 0.5 * before
        ratio = 0.01 * before / gradient  # of norms: all elements are equal
        np.testing.assert_allclose(after, before - 0.1 * ratio * gradient, rtol=1e-6)
    np.testing.assert_allclose(params["head"]["bias"], 1 - 0.1, rtol=1e-6)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_trust_ratios_are_for_kernels_and_not_for_biases_of_whatever_shape(name):
    attention = nn.MultiHeadDotProductAttention(2)
    shapes = jax.eval_shape(attention.init, jax.random.key(0), jnp.ones((1, 3, 8)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
    params = {"attention": params, "positions": np.ones((1, 3, 8), np.float32)}
    optimizer = make_optimizer(OptimConfig(name, momentum=0.0, eps=1e-12), optax.constant_schedule(0.1), params)
    update = jax.jit(lambda params: optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)[0])
    updates = update(params)
    plain = jax.tree.map(lambda leaf: np.allclose(leaf, -0.1, rtol=1e-4), updates)
    assert plain["positions"] and plain["attention"]["query"]["bias"] and not plain["attention"]["query"]["kernel"]


def test_lamb_steps_as_far_as_the_norm_of_a_matrix_says():
    params = updated(gradient=1.0, name="lamb", weight_decay=0.5, decay_rules=RULES)
    # Adam's first step is 1 everywhere; decay joins it before the trust ratio |w| / |step|.
    for before, after in ((5.0, params["head"]["kernel"]), (2.0, params["dense"]["kernel"].u)):
        np.testing.assert_allclose(after, before - 0.1 * before, rtol=1e-5)
    np.testing.assert_allclose(params["head"]["bias"], 1 - 0.1, rtol=1e-5)


def test_weight_decay_reaches_kernels_and_factors_and_nothing_else():
    params = updated(weight_decay=0.5, decay_rules=RULES, momentum=0.0)
    np.testing.assert_allclose(params["head"]["kernel"], 5 * (1 - 0.05), rtol=1e-6)
    np.testing.assert_allclose(params["dense"]["kernel"].u, 2 * (1 - 0.05), rtol=1e-6)
    np.testing.assert_allclose(params["dense"]["kernel"].v, 3 * (1 - 0.05), rtol=1e-6)
    np.testing.assert_array_equal(params["dense"]["bias"], 1)


def test_multipliers_scale_weight_decay():
    params = updated(weight_decay=0.5, decay_rules=(("head/kernel", 0.1), (".*/u", 2.0), (".*", 0.0)), momentum=0.0)
    np.testing.assert_allclose(params["head"]["kernel"], 5 * (1 - 0.005), rtol=1e-6)
    np.testing.assert_allclose(params["dense"]["kernel"].u, 2 * (1 - 0.1), rtol=1e-6)
    np.testing.assert_array_equal(params["dense"]["kernel"].v, 3)


def test_factors_under_frobenius_decay_take_no_weight_decay():
    params = updated(weight_decay=0.5, frobenius_decay=0.01, decay_rules=RULES, momentum=0.0)
    u, v = np.full((4, 2), 2.0), np.full((2, 3), 3.0)
    np.testing.assert_allclose(params["dense"]["kernel"].u, u - 0.1 * 0.01 * u @ (v @ v.T), rtol=1e-6)
    np.testing.assert_allclose(params["dense"]["kernel"].v, v - 0.1 * 0.01 * (u.T @ u) @ v, rtol=1e-6)
    np.testing.assert_allclose(params["head"]["kernel"], 5 * (1 - 0.05), rtol=1e-6)


def test_factors_under_nuclear_decay_take_no_other():
    params = updated(weight_decay=0.5, nuclear_decay=0.01, decay_rules=RULES, momentum=0.0)
    np.testing.assert_allclose(params["dense"]["kernel"].u, 2 * (1 - 0.1 * 0.01), rtol=1e-6)
    np.testing.assert_allclose(params["dense"]["kernel"].v, 3 * (1 - 0.1 * 0.01), rtol=1e-6)
    np.testing.assert_allclose(params["head"]["kernel"], 5 * (1 - 0.05), rtol=1e-6)


def test_clipping_bounds_the_global_norm():
    params = updated(gradient=100.0, clip_norm=1.0, momentum=0.0)
    moved = np.sqrt(
        sum(float(((a - b) ** 2).sum()) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(PARAMS), strict=True))
    )
    np.testing.assert_allclose(moved, 0.1, rtol=1e-4)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("dense/kernel/.", 1.0)], "no decay rule matches 'dense/bias' .and 2 more.; the nearest is 'dense/kernel/.'"),
        ([("dens/kernel", 1.0), (".*", 0.0)], "rule 'dens/kernel' matches no parameter"),
    ],
)
def test_decay_rules_must_cover_everything_and_all_be_used(rules, message):
    with pytest.raises(ValueError, match=message):
        decay_multipliers(PARAMS, rules, skip_factors=False)
