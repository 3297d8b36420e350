"""The wall between the two halves: the library half needs jax, flax, optax and numpy alone."""

import ast
import subprocess
import sys

LIBRARY = {
    "ablations", "activations", "approximation", "chips", "decay", "discover", "execution", "inputs", "kernel", "layers",
    "leading", "linalg", "messages", "methods", "paths", "plans", "projection", "ranks", "stacks", "subspaces", "surgery",
    "theory", "windows",
}  # fmt: skip
ALLOWED = {"jax", "flax", "optax", "numpy"}


def _imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "lowrank_jax")


def test_the_library_half_imports_nothing_but_itself_and_four_packages(repository):
    package = repository / "lowrank_jax"
    files = [file for module in LIBRARY for file in sorted((package / module).glob("*.py")) or [package / f"{module}.py"]]
    for file in [package / "__init__.py", *files]:
        for name in _imports(file):
            top, *rest = name.split(".")
            if top == "lowrank_jax":
                assert not rest or rest[0] in LIBRARY, f"{file.name} imports {name}"
            else:
                assert top in ALLOWED | sys.stdlib_module_names, f"{file.name} imports {name}"


def test_importing_the_library_loads_none_of_the_experiment_half():
    code = "import sys, lowrank_jax; print([m for m in ('tensorflow', 'orbax', 'clu', 'grain') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
