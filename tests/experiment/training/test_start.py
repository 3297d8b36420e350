import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.network import Network
from lowrank_jax.experiment.training.start import init_dense, state_collections

IMAGES = np.zeros((1, 2, 2, 1), np.float32)


class Model(nn.Module):
    """Sows outputs in two ways, and counts its calls."""

    memory: str = "count"

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Dense(3)(x.reshape(len(x), -1))
        self.sow("features", "y", y, reduce_fn=lambda old, new: new)
        self.sow("losses", "l2", (y**2).mean(), reduce_fn=jnp.add, init_fn=lambda: 0.0)
        if self.memory == "key":
            self.variable("memory", "key", lambda: jax.random.key(0))
        else:
            count = self.variable("memory", "count", lambda: jnp.zeros((), jnp.int32))
            if train:
                count.value += 1
        return y


def collections(model):
    return state_collections(Network(model), model.init(jax.random.key(0), IMAGES), IMAGES)


def test_what_a_model_reads_is_state_and_what_it_only_writes_is_not():
    assert collections(Model()) == {"memory": {"count": 0}}


def test_what_a_checkpoint_cannot_hold_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"the collection 'memory/key' holds key<fry>, which a checkpoint cannot"):
        collections(Model("key"))


def test_boxes_of_a_models_initialisers_are_off():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    variables = jax.eval_shape(lambda: init_dense(Network(nn.Dense(5, kernel_init=init)), jnp.ones((1, 4)), 0))
    assert variables["params"]["kernel"].shape == (4, 5)  # rules of the config find it by its name
