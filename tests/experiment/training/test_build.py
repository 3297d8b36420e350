"""The state before the first step: by the devices or the host, on one device or laid out over many."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.config.schema import InitConfig
from lowrank_jax.experiment.training.build import build
from lowrank_jax.kernel import is_low_rank
from lowrank_jax.paths import named_leaves
from lowrank_jax.projection import matrix
from tests import running


class Zoo(nn.Module):
    """Kernels of several shapes: a convolution, a repeated layer, one of rank one and one of zeros."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.Conv(16, (3, 3), name="conv")(x)).mean((1, 2))
        x = nn.relu(nn.Dense(24, name="wide")(x))
        scan = nn.scan(Layer, variable_axes={"params": 0, "lowrank_inputs": 0}, split_rngs={"params": True}, length=3)
        x, _ = scan(name="layers")(x, None)
        x = nn.relu(nn.Dense(32, kernel_init=_rank_one, name="deficient")(x))
        x = nn.relu(nn.Dense(32, kernel_init=nn.initializers.zeros, name="zero")(x) + 1)
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(self.num_classes, name="head")(x))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(nn.Dense(24, name="dense")(x)), None


def _rank_one(key, shape, dtype=jnp.float32):
    row, column = jax.random.split(key)
    return jax.random.normal(row, (shape[0], 1), dtype) @ jax.random.normal(column, (1, shape[1]), dtype)


ZOO = {
    "model__name": f"{__name__}:Zoo",
    "model__kwargs": {},
    "lowrank__rules": ({"path": "conv/kernel", "scheme": "spatial"},),
    "optim__ema_decay": 0.9,
}


SHARDED = {"mesh__data": 2, "mesh__fsdp": 4}
RNG = np.random.default_rng(0)
BATCHES = [{"image": RNG.integers(0, 17, (32, 8, 8, 1), np.uint8)} for _ in range(2)]


@functools.cache
def factored(svd, moments, **mesh):
    """Of an initial state: all leaves by name, and the kernels as matrices by name."""
    config = with_init(running.parsed(devices=1 if mesh == {"mesh__data": 1} else 8, **ZOO, **mesh), svd)
    config = dataclasses.replace(config, lowrank=dataclasses.replace(config.lowrank, moment_batches=moments))
    devices = jax.devices()[: config.mesh.least_devices] if mesh else None
    state = build(config, devices=devices).init(lambda: BATCHES[:moments])
    pairs = {k: leaf for k, leaf in named_leaves(state.params, is_leaf=is_low_rank).items() if is_low_rank(leaf)}
    merged = jax.jit(lambda pairs: {name: pair.merge() for name, pair in pairs.items()})(pairs)
    return state, jax.device_get(merged)


def with_init(config, svd):
    return dataclasses.replace(config, init=InitConfig(svd=svd))


@functools.cache
def dense_kernels():
    config = running.config(**{**ZOO, "lowrank__method": "none", "lowrank__rules": ()})
    return jax.device_get(named_leaves(build(config).init().params))


def check_same_risks(one, other):
    plan = configs.make_plan(running.config(**ZOO))
    assert one.keys() == other.keys() == {kernel.name for kernel in plan.factored}
    for kernel in plan.factored:
        view = kernel.view
        w, a, b = (
            np.stack([view.to_matrix(part) for part in parts.reshape(-1, *view.shape)])
            for parts in (dense_kernels()[kernel.name], one[kernel.name], other[kernel.name])
        )
        relative = functools.partial(matrix.relative_risk, activation="relu", group=view.group)
        risks = jax.jit(jax.vmap(lambda w, a, b, risk=relative: (risk(w, a), risk(w, b))))
        np.testing.assert_allclose(*risks(w, a, b), rtol=1e-4, atol=1e-6)


@pytest.mark.slow  # by size; below, the host and the devices give one product
@pytest.mark.parametrize("moments", [0, 2])
def test_the_host_decomposes_as_the_devices_do(moments):
    state, ours = factored("device", moments, **SHARDED)
    other, theirs = factored("host", moments, **SHARDED)
    check_same_risks(ours, theirs)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), state) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), other
    )
    untouched = ("bias", "scale", "mean", "head/kernel")
    for (name, one), two in zip(named_leaves(state.params).items(), named_leaves(other.params).values(), strict=True):
        if name.endswith(untouched) and "conv" not in name:
            np.testing.assert_array_equal(one, two, err_msg=name)


def test_kernels_are_projected_for_the_inputs_that_the_batches_give_them():
    (_, plain), (_, aware) = (factored("device", moments, **SHARDED) for moments in (0, 2))
    assert not np.allclose(plain["wide/kernel"], aware["wide/kernel"], rtol=1e-2)


def test_a_mesh_that_shards_parameters_has_the_factors_of_one_device():
    state, sharded = factored("device", 0, **SHARDED)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    _, single = factored("device", 0, mesh__data=1)
    _, by_host = factored("host", 0, **SHARDED)
    for name, kernel in single.items():
        np.testing.assert_allclose(sharded[name], kernel, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(by_host[name], kernel, atol=2e-5, err_msg=name)


def test_the_devices_decompose_unless_the_host_is_to():
    experiment = build(running.config(**ZOO))
    assert 1 <= experiment.lower_init().as_text().count("lapack_ssyevd_ffi") <= 12
    by_host = dataclasses.replace(experiment, config=with_init(experiment.config, "host"))
    assert "lapack" not in by_host.lower_init().as_text()


@pytest.mark.slow
def test_the_initialiser_of_a_large_network_has_few_decompositions(repository):
    given = configs.load(str(repository / "configs" / "imagenet_resnet50_lowrank.py"))
    experiment = build(configs.parse(given, devices=8))
    assert len({(kernel.view.n, kernel.view.m) for kernel in experiment.plan.factored}) == 19
    text = experiment.lower_init().as_text()
    assert 1 <= text.count("lapack_ssyevd_ffi") <= 12
    assert text.count("lapack_spotrf_ffi") <= 4
    for other in ("lapack_sgesdd_ffi", "lapack_sgeqrf_ffi"):
        assert other not in text
    lowered = dataclasses.replace(experiment, config=with_init(experiment.config, "host")).lower_init()
    assert "lapack" not in lowered.as_text()


def test_init_takes_one_of_two_values():
    given = configs.default()
    configs.override(given, "init.svd", "hots")
    with pytest.raises(configs.ConfigError, match=r"init\.svd: .*did you mean host"):
        configs.parse(given)


def test_a_process_without_a_cpu_device_says_what_to_do(monkeypatch):
    def none(**_):
        raise RuntimeError("Unknown backend cpu")

    config = with_init(running.config(), "host")
    experiment = build(config)
    monkeypatch.setattr(jax, "local_devices", none)
    with pytest.raises(configs.ConfigError, match=r"init\.svd: .*add cpu to it"):
        experiment.init()


def test_a_plan_of_nothing_initialises():
    model = nn.Dense(8)
    params = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    plan = lr.plan(model, jnp.ones((1, 4)), [])
    assert lr.factorize(params, plan, key=jax.random.key(0)).keys() == params.keys()
