"""The wall between the two halves: everything outside `experiment/` imports jax, flax, optax and numpy alone."""

import ast
import subprocess
import sys

ALLOWED = {"jax", "flax", "optax", "numpy", "lowrank_jax", *sys.stdlib_module_names}
EXCEPTIONS = {"__main__.py", "config.py"}  # the command, and the shim that config files import


def _imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_library_half_imports_neither_the_experiment_half_nor_anything_but_four_packages(repository):
    package = repository / "lowrank_jax"
    for file in package.rglob("*.py"):
        inside = file.relative_to(package)
        if inside.parts[0] == "experiment" or str(inside) in EXCEPTIONS:
            continue
        for name in _imports(file):
            assert name.split(".")[0] in ALLOWED, f"{inside} imports {name}"
            assert not name.startswith(("lowrank_jax.experiment", "lowrank_jax.config")), f"{inside} imports {name}"


def test_importing_the_library_loads_none_of_the_experiment_half():
    code = "import sys, lowrank_jax; print([m for m in ('tensorflow', 'orbax', 'clu', 'grain') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_planning_and_projection_know_jax_and_no_module_library(repository):
    """Plans, ranks and factors are the same for every door; what is Linen's is in `linen/`."""
    doors = ("flax", "lowrank_jax.linen", "lowrank_jax.models", "lowrank_jax.exchange", "lowrank_jax.inputs")
    for room in ("planning", "projection"):
        for file in (repository / "lowrank_jax" / room).rglob("*.py"):
            for name in _imports(file):
                assert not f"{name}.".startswith(tuple(f"{door}." for door in doors)), f"{room}/{file.name} imports {name}"
