"""Everything that a config stands for, put together: model, plan, optimiser, mesh, and the jitted functions over them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from lowrank_jax import inputs, mixing, optim, state, step, votes
from lowrank_jax.config import ConfigError, make_plan
from lowrank_jax.data.datasets import Dataset
from lowrank_jax.plans import Plan
from lowrank_jax.schema import Config
from lowrank_jax.sharding import batch_sharding, make_mesh, replicated, tree_shardings


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `build` makes of a config.

    Attributes:
      config: the config.
      dataset: what is known of its data beforehand.
      model, plan: the network, and which of its kernels are factored.
      make_optimizer: the schedule and the optimiser of a learning rate, which may be traced.
      mesh: the devices.
      shapes: a TrainState of `jax.ShapeDtypeStruct`s with their shardings.
    """

    config: Config
    dataset: Dataset
    model: nn.Module
    plan: Plan
    make_optimizer: Callable[[Any], tuple[optax.Schedule, optax.GradientTransformation]]
    mesh: Mesh
    shapes: state.TrainState

    def init(self, batches: Iterable[dict[str, jax.Array]] = ()) -> state.TrainState:
        """The state before the first step: drawn, decomposed and laid out in one program on the devices.

        Args:
          batches: what the layers' second moments are taken from when `lowrank.moment_batches` asks for any.
        """
        moments = self._second_moments(batches) if self.config.lowrank.moment_batches else None
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        return jax.jit(self._init_state, out_shardings=shardings)(self._seed(), moments)

    def _init_state(self, seed: Any, moments: dict[str, jax.Array] | None) -> state.TrainState:
        _, optimizer = self.make_optimizer(self.config.peak_lr)
        ema = bool(self.shapes.ema)
        return state.init_state(self.model, self.plan, optimizer, blank_images(self.dataset), seed, moments, ema=ema)

    def _second_moments(self, batches: Iterable[dict[str, jax.Array]]) -> dict[str, jax.Array]:
        """Of the layers' inputs in the dense network as it is drawn, every BatchNorm on its batch's own statistics."""
        draw = functools.partial(state.init_dense, self.model, blank_images(self.dataset))
        variables = jax.jit(draw, out_shardings=replicated(self.mesh))(self._seed())
        normalize = jax.jit(self._normalizer())
        images = (normalize(batch["image"]) for batch in batches)
        dropout = {"dropout": state.key(self.config.seed, "dropout")}
        return inputs.second_moments(self.model, variables, images, self.plan, rngs=dropout, train=True)

    def compile_train_step(self) -> Callable[..., tuple[state.TrainState, step.Metrics]]:
        """The compiled training step `(state, batch) -> (state, metrics)`; it takes the old state's memory."""
        compiled, settings = self.lower_train_step().compile(), self._settings()
        return lambda state, batch: compiled(state, batch, *settings)

    def lower_train_step(self) -> jax.stages.Lowered:
        """The training step before it is compiled for the devices of the mesh, which need not be there."""

        # The seed and the learning rate are arguments of the program: another value finds it in the compilation cache.
        def train_step(state: state.TrainState, batch: dict[str, jax.Array], seed: Any, lr: Any):
            schedule, optimizer = self.make_optimizer(lr)
            settings = self.config.optim
            update = step.make_train_step(
                self.model,
                optimizer,
                schedule,
                self._mixing(),
                accumulate=settings.accumulate,
                ema_decay=settings.ema_decay,
                seed=seed,
            )
            batch, word = votes.split(batch)
            state, metrics = update(state, batch)
            return state, {**metrics, **word}

        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, replicated(self.mesh)))
        return jitted.lower(self.shapes, self._batch_shapes(), *self._settings())

    def _settings(self) -> tuple[np.uint32, np.float32]:
        return self._seed(), np.float32(self.config.peak_lr)

    def _seed(self) -> np.uint32:
        return np.uint32(self.config.seed)

    def jit_eval_step(self) -> Callable[..., step.Metrics]:
        eval_step = step.make_eval_step(self.model, self._normalizer())

        def step_with_word(params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> step.Metrics:
            batch, word = votes.split(batch)
            return {**eval_step(params, batch_stats, batch), **word}

        return jax.jit(step_with_word, out_shardings=replicated(self.mesh))

    def _normalizer(self):
        return mixing.normalizer(self.dataset.mean, self.dataset.std)

    def _mixing(self) -> mixing.Mixing:
        data = self.config.dataset
        return mixing.Mixing(
            self._normalizer(),
            self.dataset.num_classes,
            label_smoothing=self.config.optim.label_smoothing,
            random_erasing=data.random_erasing,
            mixup=data.mixup,
            cutmix=data.cutmix,
        )

    def _batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        size, sharding = self.config.batch_size, batch_sharding(self.mesh)
        return {
            "image": jax.ShapeDtypeStruct((size, *self.dataset.image_shape), jnp.uint8, sharding=sharding),
            "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=sharding),
            **votes.batch_shapes(self.mesh),
        }


def blank_images(dataset: Dataset) -> jax.Array:
    """One image, for a model to initialise on."""
    return jnp.zeros((1, *dataset.image_shape), jnp.float32)


def build(config: Config, source: str = "config", devices: Sequence[Any] | None = None) -> Experiment:
    """Puts an experiment together; nothing is computed and no data is touched.

    Args:
      config: the experiment.
      source: what to call it in messages.
      devices: of the mesh, by default all of this machine's.

    Raises:
      ConfigError: the parts do not fit together.
    """
    plan, dataset, model = make_plan(config), config.description, config.build_model()
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.model, devices)
    settings = config.optim
    init_params = functools.partial(state.init_params, model, plan, blank_images(dataset), config.seed)
    params, _ = jax.eval_shape(init_params)

    def make_optimizer(lr: Any) -> tuple[optax.Schedule, optax.GradientTransformation]:
        schedule = optim.make_schedule(
            settings.schedule,
            lr,
            total_steps=config.total_steps,
            warmup=config.in_steps(settings.warmup),
            step_at=[config.in_steps(moment) for moment in settings.step_at],
            step_every=max(1, config.in_steps(settings.step_every)),
            step_factor=settings.step_factor,
        )
        optimizer = optim.make_optimizer(
            settings.name,
            schedule,
            params,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            trust_coefficient=settings.trust_coefficient,
            clip_norm=settings.clip_norm,
            weight_decay=settings.weight_decay,
            decay_rules=settings.decay_rules,
            frobenius_decay=settings.frobenius_decay,
            nuclear_decay=settings.nuclear_decay,
        )
        return schedule, optimizer

    try:
        _, optimizer = make_optimizer(config.peak_lr)
    except ValueError as error:
        raise ConfigError(source, [f"optim.decay_rules: {line}" for line in str(error).splitlines()]) from error
    ema = settings.ema_decay is not None
    init_state = functools.partial(state.init_state, model, plan, optimizer, blank_images(dataset), config.seed, ema=ema)
    shapes = jax.eval_shape(init_state)
    return Experiment(config, dataset, model, plan, make_optimizer, mesh, _placed(shapes, tree_shardings(shapes, mesh)))


def _placed(shapes: Any, shardings: Any) -> Any:
    def place(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, shardings)
