"""Puts configs/ and the documents of users into a wheel, beside the modules. An editable install has them in place."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"]["configs"] = "lowrank_jax/configs"
            build_data["force_include"]["README.md"] = "lowrank_jax/docs/README.md"
            build_data["force_include"]["docs/your_own.md"] = "lowrank_jax/docs/your_own.md"
