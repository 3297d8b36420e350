"""Which settings make two work directories the same experiment."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.config.schema import BUDGETS
from lowrank_jax.experiment.duration import Duration

# Settings that may change between two starts of one experiment: where data and code are, what is written and how often, the
# devices, how layers run on them, what decomposes their kernels, and the limit of undecodable images, on which no result
# depends while it is not reached.
_FREE = (
    "code_dir", "dataset.data_dir", "dataset.max_undecodable", "eval.batch_size", "checkpoint.", "init.svd", "log.", "profile.",
    "lowrank.execution", "mesh.",
)  # fmt: skip

# The first defaults of settings whose default is another one now: digests leave these out, as they did when they were written.
_FIRST_DEFAULTS = {"lowrank.budget.objective": "correlation", "lowrank.budget.min_scale": 0.0}


@functools.cache
def defaults() -> dict[str, Any]:
    """Every setting's default, as it is read from JSON."""
    return json.loads(json.dumps(configs.to_dict(configs.Config())))


def config_digest(config: dict[str, Any]) -> str:
    """A short digest, equal for configs that may share a work directory."""
    flat, usual = _without_idle_budget(flatten(json.loads(json.dumps(config)))), {**flatten(defaults()), **_FIRST_DEFAULTS}
    # Defaults are left out, so that the digest stays the same when settings are added.
    chosen = {key: value for key, value in flat.items() if key not in usual or value != usual[key]}
    text = json.dumps({key: value for key, value in sorted(chosen.items()) if not key.startswith(_FREE)})
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def digest_of(config: configs.Config) -> str:
    """The same of a parsed config."""
    return config_digest(configs.to_dict(config))


def earlier_digests(config: configs.Config) -> tuple[str, ...]:
    """The digests of the experiments that this one extends, the latest first; it shares all of their steps."""
    return tuple(map(digest_of, config.earlier()))


def run_digests(config: dict[str, Any]) -> list[str]:
    """The digests of a stored config's experiment and of those that it extends, without looking at its data."""
    digests = [config_digest(config)]
    extensions = list(config.get("extensions") or ())
    while extensions:
        length = Duration.read(extensions.pop()[0])
        steps, epochs = (None, length.amount) if length.unit == "epoch" else (int(length.amount), None)
        digests.append(config_digest({**config, "steps": steps, "epochs": epochs, "extensions": extensions}))
    return digests


def check_experiment(record: Mapping[str, Any], config: configs.Config) -> None:
    """Raises ValueError if a file of a work directory names another experiment; those of earlier versions name none."""
    if record.get("experiment") not in (None, digest_of(config), *earlier_digests(config)):
        raise ValueError("it is another experiment's")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each setting by which two configs are different experiments."""
    old, new = flatten(old), flatten(json.loads(json.dumps(new)))
    return [f"{key} is {old.get(key, 'not set')} there, {new.get(key, 'not set')} here" for key in differing_keys([old, new])]


def differing_keys(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The dotted keys by which experiments differ; settings that may change between two starts are not compared."""
    settings = [_without_idle_budget(values) for values in settings]
    keys = dict.fromkeys(key for values in settings for key in values)
    return sorted(
        key for key in keys if not key.startswith(_FREE) and any(v.get(key) != settings[0].get(key) for v in settings)
    )


def has_budget(flat: Mapping[str, Any]) -> bool:
    """Whether a config by dotted key has one."""
    return any(flat.get(key) is not None for key in BUDGETS)


def _without_idle_budget(flat: dict[str, Any]) -> dict[str, Any]:
    """Without what is said of a budget where there is none."""
    return flat if has_budget(flat) else {key: value for key, value in flat.items() if not key.startswith("lowrank.budget.")}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's values by dotted key."""
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
