import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import models
from lowrank_jax.paths import named_leaves
from tests import drawn


def variables_like(**kwargs):
    model = models.build("wrn_16_4", num_classes=10, **kwargs)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize(("depth", "widening"), [(10, 1), (16, 4), (28, 10), (40, 2)])
def test_parameters_by_hand(depth, widening):
    """Counted along the network: 3x3 kernels, two numbers a channel normalised, a 1x1 shortcut wherever the width changes."""
    total, inputs = 9 * 3 * 16, 16
    for width in (16 * widening, 32 * widening, 64 * widening):
        for _ in range((depth - 4) // 6):
            total += 9 * inputs * width + 9 * width * width + 2 * inputs + 2 * width
            total += inputs * width if inputs != width else 0
            inputs = width
    total += 2 * inputs + 10 * inputs + 10
    params = variables_like(depth=depth, widening=widening)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == total


def test_shortcuts_are_identities_but_where_the_width_changes():
    names = named_leaves(variables_like()["params"])
    assert [name for name in names if "proj" in name] == [f"stage{i}/block1/proj/kernel" for i in (1, 2, 3)]
    narrow = named_leaves(variables_like(widening=1)["params"])
    assert "stage1/block1/proj/kernel" not in narrow


def test_the_last_block_adds_to_what_it_is_fed():
    """Nothing normalises or cuts off a sum before the next block: with its last kernels at zero, a block is its shortcut."""
    model = models.build("wrn_16_4", num_classes=10, depth=10, widening=1)
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    variables = drawn.variables(model, x)
    variables["params"]["stage1"]["block1"]["conv2"]["kernel"] *= 0

    @jax.jit
    def run(variables, x):
        _, state = model.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])
        return state["intermediates"]["stage1"]["block1"]["__call__"][0], state["intermediates"]["stem"]["__call__"][0]

    np.testing.assert_array_equal(*run(variables, x))
