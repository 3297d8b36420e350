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
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from lowrank_jax.experiment import optim
from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.config.plan import make_plan
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.data.base import Dataset
from lowrank_jax.experiment.hosts import votes
from lowrank_jax.experiment.hosts.sharding import (
    absent_mesh,
    batch_sharding,
    batch_shards,
    gathered,
    make_mesh,
    replicated,
    state_shardings,
)
from lowrank_jax.experiment.training import mixing, state, step
from lowrank_jax.experiment.training.objective import Objective, make_objective
from lowrank_jax.linen import inputs
from lowrank_jax.planning import chips
from lowrank_jax.planning.execution import choose_execution
from lowrank_jax.planning.plans import Plan
from lowrank_jax.text import first_line


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `build` makes of a config.

    Attributes:
      config: the config.
      dataset: what is known of its data beforehand.
      model, plan: the network, and which of its kernels are factored.
      make_optimizer: the schedule and the optimiser of a learning rate, which may be traced.
      mesh: the devices; abstract where they need not be there.
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
        """The state before the first step, drawn on the devices and laid out over them; `init.svd` says what decomposes it.

        Args:
          batches: what the layers' second moments are taken from when `lowrank.moment_batches` asks for any.

        Raises:
          ConfigError: jax has no CPU device for `init.svd="host"`.
        """
        moments = self._second_moments(batches) if self.config.lowrank.moment_batches else None
        if self.config.init.svd == "host":
            return self._init_by_host(moments)
        return self._jit_init()(self._seed(), moments)

    def lower_init(self) -> jax.stages.Lowered:
        """What `init` has the devices of the mesh, which need not be there, draw and decompose; before it is compiled."""
        if self.config.init.svd == "host":
            return self._jit_draw().lower(self._seed())
        moments = inputs.moment_shapes(self.plan) if self.config.lowrank.moment_batches else None
        return self._jit_init().lower(self._seed(), moments)

    def _jit_init(self) -> Any:
        def init_state(seed: Any, moments: dict[str, jax.Array] | None) -> state.TrainState:
            return self._fresh(*state.init_params(self.model, self.plan, blank_images(self.dataset), seed, moments))

        return jax.jit(init_state, out_shardings=self._shardings())

    def _jit_draw(self) -> Any:
        """Of the dense network, on every device."""
        draw = functools.partial(state.init_dense, self.model, blank_images(self.dataset))
        return jax.jit(draw, out_shardings=replicated(self.mesh))

    def _fresh(self, params: Any, batch_stats: Any) -> state.TrainState:
        _, optimizer = self.make_optimizer(self.config.peak_lr)
        return state.fresh_state(params, batch_stats, optimizer, ema=bool(self.shapes.ema))

    def _shardings(self) -> Any:
        return jax.tree.map(lambda leaf: leaf.sharding, self.shapes)

    def _init_by_host(self, moments: dict[str, jax.Array] | None) -> state.TrainState:
        variables = _on_host(self._jit_draw()(self._seed()))
        # Moments of a batch that several processes read are on the devices of all of them.
        moments = moments and _on_host(jax.jit(lambda tree: tree, out_shardings=replicated(self.mesh))(moments))
        with jax.default_device(_cpu()):
            parts = _on_host(state.factorized(variables, self.plan, self._seed(), moments))
        if jax.process_count() > 1:  # hosts of two kinds may round differently, and every replica has to be the same
            parts = multihost_utils.broadcast_one_to_all(parts)
        return jax.jit(self._fresh, out_shardings=self._shardings())(*parts)

    def _second_moments(self, batches: Iterable[dict[str, jax.Array]]) -> dict[str, jax.Array]:
        """Of the layers' inputs in the dense network as it is drawn, every BatchNorm on its batch's own statistics."""
        variables = self._jit_draw()(self._seed())
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
                objective=self.objective,
                accumulate=settings.accumulate,
                ema_decay=settings.ema_decay,
                seed=seed,
                gather=self._gather,
            )
            batch, word = votes.split(batch)
            state, metrics = update(state, batch)
            return state, {**metrics, **word}

        jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(self._shardings(), replicated(self.mesh)))
        return jitted.lower(self.shapes, self._batch_shapes(self.config.batch_size), *self._settings())

    @property
    def objective(self) -> Objective:
        return make_objective(self.config.objective.loss, self.config.objective.metrics)

    def _settings(self) -> tuple[np.uint32, np.float32]:
        return self._seed(), np.float32(self.config.peak_lr)

    def _seed(self) -> np.uint32:
        return np.uint32(self.config.seed)

    def jit_eval_step(self) -> jax.stages.Wrapped:
        eval_step = step.make_eval_step(self.model, self._normalizer(), objective=self.objective, gather=self._gather)

        def step_with_word(params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> step.Metrics:
            batch, word = votes.split(batch)
            return {**eval_step(params, batch_stats, batch), **word}

        return jax.jit(step_with_word, out_shardings=replicated(self.mesh))

    def _gather(self, params: Any) -> Any:
        """Parameters as a step computes with them: what cuts a batch does not cut them.

        Left to itself the TPU's compiler cuts the convolutions instead and passes slices of kernels around (CHANGELOG.md).
        """
        stored = self._shardings().params
        computed = gathered(stored)
        if computed == stored:  # an evaluation step may then serve networks of other ranks
            return params
        return jax.lax.with_sharding_constraint(params, computed)

    def lower_eval_step(self) -> jax.stages.Lowered:
        """The evaluation step of training before it is compiled for the devices of the mesh, which need not be there."""
        evaluated = self.shapes.variables()[""]
        batch = self._batch_shapes(self.config.eval.batch_size)
        batch["mask"] = jax.ShapeDtypeStruct(batch["label"].shape, jnp.float32, sharding=batch["label"].sharding)
        return self.jit_eval_step().lower(evaluated["params"], evaluated["batch_stats"], batch)

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

    def _batch_shapes(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        sharding = batch_sharding(self.mesh)
        return {
            "image": jax.ShapeDtypeStruct((size, *self.dataset.image_shape), jnp.uint8, sharding=sharding),
            "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=sharding),
            **votes.batch_shapes(self.mesh),
        }


def _on_host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def _cpu() -> Any:
    """This process's CPU as a device.

    Raises:
      ConfigError: jax was told to do without.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        hint = f'"host" takes jax\'s CPU device: unset JAX_PLATFORMS or add cpu to it ({first_line(error)})'
        raise ConfigError("config", [f"init.svd: {hint}"]) from error


def blank_images(dataset: Dataset) -> jax.Array:
    """One image, for a model to initialise on."""
    return jnp.zeros((1, *dataset.image_shape), jnp.float32)


def build(config: Config, source: str = "config", devices: Sequence[Any] | int | None = None) -> Experiment:
    """Puts an experiment together; nothing is computed and no data is touched.

    Args:
      config: the experiment.
      source: what to call it in messages.
      devices: of the mesh, by default all of this machine's; a number for some that need not be there, to see the layout.

    Raises:
      ConfigError: the parts do not fit together.
    """
    dataset, model = config.description, config.build_model()
    mesh = _mesh(config, devices)
    plan = planned_for(mesh, config)
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
    try:
        shardings = state_shardings(shapes, mesh, config.mesh.to_rules())
    except ValueError as error:
        raise ConfigError(source, [f"mesh.rules: {line}" for line in str(error).splitlines()]) from error
    return Experiment(config, dataset, model, plan, make_optimizer, mesh, _placed(shapes, shardings))


def _mesh(config: Config, devices: Sequence[Any] | int | None) -> Mesh:
    if isinstance(devices, int):
        return absent_mesh(**config.mesh.sizes(devices))
    return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.model, devices)


def planned_for(mesh: Mesh | AbstractMesh, config: Config) -> Plan:
    """The config's plan, with the execution of every kernel chosen for the devices of a mesh, if there are any."""
    if isinstance(mesh, AbstractMesh):
        return make_plan(config)
    chip = chips.of_device(mesh.devices.flat[0])
    part = batch_shards(mesh) * config.optim.accumulate
    itemsize = jnp.dtype(config.model.dtype).itemsize
    return choose_execution(make_plan(config), chip, batch=max(1, config.batch_size // part), itemsize=itemsize)


def _placed(shapes: Any, shardings: Any) -> Any:
    def place(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, shardings)
