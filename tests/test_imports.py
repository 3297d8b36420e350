"""The wall between the two halves, and a graph of imports without circles."""

import ast
import graphlib
import subprocess
import sys
import tomllib

import pytest

import lowrank_jax

ALLOWED = {"jax", "flax", "optax", "numpy", "lowrank_jax", *sys.stdlib_module_names}
EXTRAS = {"safetensors", "onnx"}  # which functions of exchange/ may import in their bodies
EXCEPTIONS = {"lowrank_jax.__main__", "lowrank_jax.config"}  # the command, and the shim that config files import


def imports(tree, modules):
    """Modules that a file imports, in functions too; not for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else node.module for name in names)
        else:
            yield from imports(node, modules)


@pytest.fixture(scope="module")
def graph(repository):
    """The imports of every module of the package."""
    files = (repository / "lowrank_jax").rglob("*.py")
    modules = {".".join(file.relative_to(repository).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    return {name: set(imports(ast.parse(file.read_text()), modules)) for name, file in modules.items()}


def room(module):
    """The folder of a module below lowrank_jax or lowrank_jax.experiment; a module outside of any is a room of its own."""
    parts = module.split(".")
    return ".".join(parts[: 3 if parts[1:2] == ["experiment"] else 2])


def test_the_library_half_imports_neither_the_experiment_half_nor_anything_but_four_packages(graph):
    for module in graph.keys() - EXCEPTIONS:
        if module.startswith("lowrank_jax.experiment"):
            continue
        for name in graph[module]:
            extra = EXTRAS if module.startswith("lowrank_jax.exchange") else set()
            assert name.split(".")[0] in ALLOWED | extra, f"{module} imports {name}"
            assert not name.startswith(("lowrank_jax.experiment", "lowrank_jax.config")), f"{module} imports {name}"


def test_planning_and_projection_know_jax_and_no_module_library(graph):
    """Plans, ranks and factors are the same for every door; what is Linen's is in `linen/`."""
    doors = ("flax", "lowrank_jax.linen", "lowrank_jax.models", "lowrank_jax.exchange", "lowrank_jax.inputs")
    for module in graph:
        if room(module) in ("lowrank_jax.planning", "lowrank_jax.projection"):
            for name in graph[module]:
                assert not f"{name}.".startswith(tuple(f"{door}." for door in doors)), f"{module} imports {name}"


def test_modules_import_each_other_in_no_circle(graph):
    own = {module: {name for name in names if name in graph} for module, names in graph.items()}
    graphlib.TopologicalSorter(own).prepare()


def test_rooms_import_each_other_in_no_circle(graph):
    rooms = {}
    for module, names in graph.items():
        rooms.setdefault(room(module), set()).update(room(name) for name in names if name in graph)
    graphlib.TopologicalSorter({name: others - {name} for name, others in rooms.items()}).prepare()


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_library_loads_none_of_the_experiment_half():
    load = "import sys, lowrank_jax as lr; [getattr(lr, name) for name in (*lr.__all__, 'models')]"
    others = ("lowrank_jax.experiment", "ml_collections", "tensorflow", "orbax", "clu", "grain", "matplotlib")
    assert python(f"{load}; print([module for module in {others} if module in sys.modules])") == "[]\n"


def test_the_command_handles_signals_before_it_imports_anything_that_takes_time(repository):
    script = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["scripts"]["lowrank"]
    assert script == "lowrank_jax.__main__:main"
    code = """
import sys, lowrank_jax.__main__ as command
from lowrank_jax.experiment import interrupts
print([name for name in ("jax", "numpy", "argparse", "dataclasses", "pathlib") if name in sys.modules])
obey = interrupts.obey
interrupts.obey = lambda: (print("obeys", "argparse" in sys.modules), obey())
sys.argv = ["lowrank", "--help"]
command.main()
"""
    assert python(code).startswith("[]\nobeys False\nusage: ")


def test_public_names_are_loaded_when_they_are_used():
    assert python("import sys, lowrank_jax; print('jax' in sys.modules, lowrank_jax.__version__)").startswith("False ")
    code = "from lowrank_jax import *; print(Rule.__module__, plan.__module__, chips.__name__)"
    assert python(code).split() == ["lowrank_jax.planning.rules", "lowrank_jax.linen.plan", "lowrank_jax.planning.chips"]


def test_public_names_are_listed_and_others_are_no_attributes():
    modules = {"activations", "chips", "config", "inputs", "models", "projection", "theory"}
    assert modules | set(lowrank_jax.__all__) <= set(dir(lowrank_jax))
    for name in modules | set(lowrank_jax.__all__):
        assert getattr(lowrank_jax, name) is not None
    with pytest.raises(AttributeError, match="'lowrank_jax' has no attribute 'plna'"):
        _ = lowrank_jax.plna


def test_the_names_for_type_checkers_are_those_that_are_loaded(repository):
    tree = ast.parse((repository / "lowrank_jax" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: f"{node.module}.{alias.name}" for node in block.body for alias in node.names}
    homes = {name: f"lowrank_jax.{home}.{name}" for name, home in lowrank_jax._HOMES.items()}
    assert typed == homes | {name: f"lowrank_jax.{module}" for name, module in lowrank_jax._MODULES.items()}


def test_the_package_says_that_it_has_types(repository):
    assert (repository / "lowrank_jax" / "py.typed").is_file()
