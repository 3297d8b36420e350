import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.hosts.sharding import (
    absent_mesh,
    batch_sharding,
    bytes_per_device,
    make_mesh,
    put_batch,
    read_rules,
    rule_problems,
    state_shardings,
)
from lowrank_jax.experiment.preflight.collectives import collectives
from lowrank_jax.experiment.training.build import build as build_experiment
from lowrank_jax.experiment.training.phases import phases_of
from lowrank_jax.experiment.training.state import TrainState
from lowrank_jax.experiment.workdir.checkpoint import Checkpoints
from lowrank_jax.kernel import LowRankKernel
from lowrank_jax.paths import named_leaves
from tests import running


@pytest.mark.parametrize(
    ("axes", "sizes"), [({}, (8, 1, 1)), ({"data": 2, "fsdp": -1}, (2, 4, 1)), ({"data": 2, "fsdp": 2, "model": 2}, (2, 2, 2))]
)
def test_one_axis_takes_the_devices_that_are_left(axes, sizes):
    assert tuple(make_mesh(**axes).shape.values()) == sizes


def test_batches_are_cut_over_data_and_fsdp():
    mesh = make_mesh(2, 2, 2)
    batch = put_batch({"image": np.arange(8.0)}, mesh)["image"]
    assert batch.sharding == batch_sharding(mesh)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2,)}
    np.testing.assert_array_equal(batch, np.arange(8.0))


def shapes():
    """A state whose optimiser and average keep something for every parameter, and something of their own."""
    params = {
        "pair": LowRankKernel(jnp.ones((16, 8)), jnp.ones((8, 32))),
        "conv": LowRankKernel(jnp.ones((3, 3, 16, 64)), jnp.ones((64, 6)), (0, 1, 2)),
        "spatial": LowRankKernel(jnp.ones((3, 16, 8)), jnp.ones((8, 5, 24)), (0, 2)),
        "stacked": LowRankKernel(jnp.ones((2, 16, 64)), jnp.ones((2, 64, 32))),
        "dense": jnp.ones((16, 4)),
        "bias": jnp.ones((16,)),
        "scalar": jnp.ones(()),
    }
    opt_state = {"0": {"mu": params, "count": jnp.ones(())}, "row": {"dense": jnp.ones((16,))}}
    state = TrainState(jnp.zeros((), int), params, {"norm": {"mean": jnp.ones((16,))}}, opt_state, {"params": params})
    return jax.eval_shape(lambda: state)


def specs(mesh, *rules):
    rules, problems = read_rules(rules)
    assert not problems
    return {name: sharding.spec for name, sharding in named_leaves(state_shardings(shapes(), mesh, rules)).items()}


def of_params(placed):
    return {name.removeprefix("params/"): tuple(spec) for name, spec in placed.items() if name.startswith("params/")}


def test_factors_are_cut_along_their_long_side_and_never_along_the_rank():
    assert of_params(specs(absent_mesh(1, 4, 2))) == {
        "pair/u": (("model", "fsdp"), None),
        "pair/v": (None, ("model", "fsdp")),
        "conv/u": (None, None, ("model", "fsdp"), None),
        "conv/v": (None, "model"),  # 6 outputs
        "spatial/u": (None, ("model", "fsdp"), None),
        "spatial/v": (None, None, ("model", "fsdp")),
        "stacked/u": (None, ("model", "fsdp"), None),  # the axis that nn.scan walks along stays whole
        "stacked/v": (None, None, ("model", "fsdp")),
        "dense": (("model", "fsdp"), None),
        "bias": ("model",),
        "scalar": (),
    }


def test_a_mesh_of_data_alone_replicates_everything():
    assert not any(name for spec in specs(absent_mesh(8, 1, 1)).values() for name in spec)


def test_one_rule_serves_a_kernel_and_its_factors():
    rules = [
        {"path": "conv", "spec": (None, "data", "model", ("fsdp",))},
        {"path": "spatial", "spec": (None, "fsdp", "model", None)},
        {"path": "stacked", "spec": ("model", ("data", "fsdp"), None)},
        {"path": "(dense|pair)", "spec": (None, "fsdp")},
        {"path": "bias", "spec": ()},
    ]
    placed = of_params(specs(absent_mesh(2, 2, 2), *rules))
    assert placed == {
        "conv/u": (None, "data", "model", None),
        "conv/v": (None, "fsdp"),
        "spatial/u": (None, "model", None),
        "spatial/v": (None, "fsdp", None),
        "stacked/u": ("model", ("data", "fsdp"), None),
        "stacked/v": ("model", None, None),
        "pair/u": (None, None),
        "pair/v": (None, "fsdp"),
        "dense": (None, "fsdp"),
        "bias": (),
        "scalar": (),
    }


def test_what_is_kept_for_a_parameter_lies_where_it_does():
    placed = specs(absent_mesh(1, 4, 2), {"path": "pair", "spec": ("fsdp", "model")}, {"path": "bias", "spec": ()})
    kept = {name: spec for name, spec in placed.items() if "/params/" in f"/{name}" or "/mu/" in name}
    assert len(kept) == 3 * len(of_params(placed))
    for name, spec in kept.items():
        assert spec == placed["params/" + name.rpartition("params/" if "params/" in name else "mu/")[2]], name
    # Of another shape, or of nothing that is called so.
    assert placed["opt_state/row/dense"] == placed["batch_stats/norm/mean"] == PartitionSpec("model")


def test_rules_are_held_against_the_network_and_the_mesh():
    rules, problems = read_rules(
        [
            {"path": "pair", "spec": ("fdsp", None)},
            {"path": "conv", "spec": (None, "model", None, "model")},
            {"path": "spatial", "spec": (None, "fsdp", None)},
            {"path": "dense", "spec": (None, ("fsdp", "model"))},
            {"path": "bais", "spec": ()},
            {"path": "bias", "spec": (3,)},
            {"path": "(", "spec": ()},
            {"path": "scalar", "specs": ()},
        ]
    )
    problems += rule_problems(rules, shapes().params, {"fsdp": 4, "model": 2})
    expected = [
        "rule 'pair': there is no mesh axis 'fdsp'; did you mean fsdp?",
        "rule 'conv': mesh axis 'model' is used twice; it can shard an array only once",
        "rule 'bias': 3 must be None, a mesh axis or a tuple of mesh axes",
        "rule '(' is not a regular expression",
        "unknown key 'specs'; did you mean spec?",
        "rule {'path': 'scalar', 'specs': ()}: needs a path and a spec",
        "rule 'bais' matches no parameter; the nearest is 'bias'",
    ]
    assert len(problems) == len(expected)
    for problem, start in zip(problems, expected, strict=True):
        assert start in problem
    fitting = [rule for rule in rules if rule.path not in ("bais", "(")]
    assert rule_problems(fitting, shapes().params, {"fsdp": 4, "model": 2}) == [
        "rule 'dense': dense [16, 4] cannot be cut into 8 parts along axis 1 by fsdp and model",
        "rule 'spatial': spatial [3, 5, 16, 24] has 4 axes, the spec 3",
    ]
    assert len(rule_problems(fitting, shapes().params, {"fsdp": 4})) == 1  # of a mesh that is not known yet


def test_a_config_with_rules_that_do_not_fit_is_refused():
    rules = '({"path": "dense1/kernel", "spec": ("model", None)}, {"path": "haed/.*", "spec": ()})'
    with pytest.raises(ConfigError) as caught:
        running.config(mesh__data=1, mesh__model=8, mesh__rules=rules.replace("model", "modle"))
    assert caught.value.problems == [
        "mesh.rules: rule 'dense1/kernel': there is no mesh axis 'modle'; did you mean model?",
        "mesh.rules: rule 'haed/.*' matches no parameter; the nearest is 'head/bias'",
    ]


@pytest.mark.parametrize("phase", ["dense_warmup", "self_guided"])
def test_both_phases_call_a_kernel_by_one_name_so_that_one_rule_serves_them(phase):
    def read(path):
        rules = ({"path": path, "spec": ("fsdp", "model")},)
        return running.config(mesh__fsdp=2, mesh__model=2, mesh__rules=rules, **{f"lowrank__{phase}": "5 steps"})

    phases = phases_of(read("dense1/kernel"), devices=8)
    first, last = (named_leaves(each.shapes.params) for each in phases.all)
    dense = first["dense1/kernel" if phase == "dense_warmup" else "dense1/kernel/guide"]
    assert dense.sharding.spec == PartitionSpec("fsdp", "model")
    assert last["dense1/kernel/u"].sharding.spec == PartitionSpec("fsdp", None)
    assert last["dense1/kernel/v"].sharding.spec == PartitionSpec(None, "model")
    with pytest.raises(ConfigError, match="rule 'dense1/kernel/u' matches no parameter; the nearest is 'dense1/kernel'"):
        read("dense1/kernel/u")


COMMON = {"batch_size": 16, "optim__ema_decay": 0.9, "lowrank__method": "spectral"}
NETS = {
    "mlp": {**COMMON, "lowrank__rules": '({"path": "dense2/kernel", "method": "none"},)'},
    "conv": {**COMMON, "model__name": "resnet8", "model__kwargs": {"blocks": (1, 1), "widths": (8, 16)}},
}
RULES = {
    "mlp": '({"path": "dense1/kernel", "spec": (("model", "data"), "fsdp")}, {"path": "head/.*", "spec": ()})',
    "conv": '({"path": "stage.*/conv./kernel", "spec": (None, None, "data", ("fsdp", "model"))},)',
}


def build(net, mesh, **changes):
    """On eight devices."""
    axes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__model"), mesh, strict=True))
    return build_experiment(running.config(**{**NETS[net], **axes, **changes}))


def alone(net):
    return build_experiment(running.config(**NETS[net]), devices=jax.devices()[:1])


def lay_out(arrays, experiment):
    """The state of an experiment from the arrays of another one's."""
    shapes, structure = jax.tree.flatten(experiment.shapes)
    return structure.unflatten(jax.device_put(arrays, [leaf.sharding for leaf in shapes]))


def train(experiment, arrays):
    """Losses and norms of gradients of some steps, then the loss of an evaluation."""
    step, evaluate = experiment.compile_train_step(), experiment.jit_eval_step()
    rng, size, seen = np.random.default_rng(0), experiment.config.batch_size, []
    state = lay_out(arrays, experiment)

    def batch():
        images = rng.integers(0, 256, (size, 8, 8, 1)).astype(np.uint8)
        return {"image": images, "label": rng.integers(0, 10, size).astype(np.int32)}

    for _ in range(4):
        state, metrics = step(state, put_batch(batch(), experiment.mesh))
        seen += [float(metrics["loss"]), float(metrics["grad_norm"])]
    examples = put_batch({**batch(), "mask": np.ones(size, np.float32)}, experiment.mesh)
    averages = state.variables()[""]
    return [*seen, float(evaluate(averages, examples)["loss"])]


@pytest.fixture(scope="module")
def of_one_device():
    """By network: the arrays of its first state, and what it sees in training on one device."""

    @functools.cache
    def trained(net):
        experiment = alone(net)
        arrays = jax.device_get(jax.tree.leaves(experiment.init()))
        return arrays, train(experiment, arrays)

    return trained


@pytest.mark.parametrize(
    ("net", "mesh", "rules"),
    [
        ("mlp", (8, 1, 1), "()"),
        ("mlp", (2, 2, 2), RULES["mlp"]),
        pytest.param("mlp", (1, 1, 8), "()", marks=pytest.mark.slow),
        pytest.param("conv", (8, 1, 1), "()", marks=pytest.mark.slow),
        pytest.param("conv", (1, 8, 1), "()", marks=pytest.mark.slow),
        pytest.param("conv", (1, 1, 8), "()", marks=pytest.mark.slow),
        pytest.param("conv", (2, 2, 2), "()", marks=pytest.mark.slow),
        pytest.param("conv", (2, 2, 2), RULES["conv"], marks=pytest.mark.slow),
    ],
)
def test_every_mesh_trains_as_one_device_does(net, mesh, rules, of_one_device):
    arrays, expected = of_one_device(net)
    experiment = build(net, mesh, mesh__rules=rules)
    assert (bytes_per_device(experiment.shapes) < bytes_per_device(alone(net).shapes)) == (mesh != (8, 1, 1))
    # Sums in another order: float32's rounding of 6e-8, grown by four steps and by BatchNorm's division.
    np.testing.assert_allclose(train(experiment, arrays), expected, rtol=1e-5)


def test_a_checkpoint_is_restored_to_another_mesh_and_other_rules(of_one_device, tmp_path):
    arrays, _ = of_one_device("mlp")
    saved, restored = build("mlp", (2, 2, 2), mesh__rules=RULES["mlp"]), build("mlp", (1, 8, 1))
    with Checkpoints(tmp_path) as checkpoints:
        state = lay_out(arrays, saved)
        checkpoints.save(int(state.step), state, {})
        checkpoints.wait()
        back = checkpoints.restore(restored.shapes)
    assert back is not None
    for ours, array, shape in zip(jax.tree.leaves(back.state), arrays, jax.tree.leaves(restored.shapes), strict=True):
        np.testing.assert_array_equal(ours, array)
        assert ours.sharding == shape.sharding
    assert back.state.params["dense1"]["kernel"].u.sharding.spec == PartitionSpec("fsdp", None)


NETWORKS = pytest.mark.parametrize("net", ["mlp", pytest.param("conv", marks=pytest.mark.slow)])


@NETWORKS
def test_a_step_sums_no_more_than_the_parameters_weigh(net):
    sums, weights = {}, {}
    for arm in ("spectral", "none"):
        experiment = build(net, (8, 1, 1), lowrank__method=arm)
        found = collectives(str(experiment.lower_train_step().compile().as_text()))
        shapes = experiment.shapes
        # Forward and backward, BatchNorm takes two means of every channel each; loss and top-1 are means too.
        statistics = 2 * bytes_per_device(shapes.batch_stats) + 2 * 4
        sums[arm], weights[arm] = found.pop("all-reduce"), bytes_per_device(shapes.params)
        assert weights[arm] <= sums[arm] <= weights[arm] + statistics
        assert set(found) <= {"collective-permute"}  # mixup's neighbours
    assert sums["spectral"] / sums["none"] < 1.2 * weights["spectral"] / weights["none"]


@NETWORKS
def test_a_step_gathers_what_the_fsdp_axis_cuts_once_and_moves_nothing_else(net):
    experiment = build(net, (1, 8, 1), dataset__mixup=0.0)
    found = collectives(str(experiment.lower_train_step().compile().as_text()))
    cut = sum(4 * leaf.size for leaf in jax.tree.leaves(experiment.shapes.params) if any(leaf.sharding.spec))
    assert set(found) == {"all-gather", "all-reduce"} and found["all-gather"] == cut > 0
