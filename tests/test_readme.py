"""What the README shows has to run."""

import re

import jax
import pytest

from lowrank_jax.experiment.config.files import legal_keys
from lowrank_jax.kernel import is_low_rank
from lowrank_jax.paths import named_leaves


@pytest.mark.slow
def test_the_python_runs_as_written(repository, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)
    first, others, budget, faithful, execution, moments, learning, compressing = blocks
    names = {}
    exec(first, names)
    plain = names["params"]
    exec(others, names)
    unknown, taught = (table.split() for table in capsys.readouterr().out.split("total", 1))
    assert (unknown.count("premerged"), taught.count("premerged"), taught.count("auto")) == (3, 1, 2)
    exec(budget, names)
    assert names["half"].macs <= names["whole"].dense_macs / 2 and names["seen"].params <= names["whole"].dense_params / 4
    exec(faithful, names)
    assert len(names["found"].layers) == 2 and 0 < names["found"].logits_error < 1.5
    exec(execution, names)
    assert all(kernel.execution for kernel in names["plan"].factored)
    exec(moments, names)
    exec(compressing, names)
    assert names["slim"].macs <= names["slim"].dense_macs / 2 and 0 <= names["lost"].kl < 1
    exec(learning, names)
    assert names["student"].converged and names["small"].bound <= names["small"].risk <= names["small"].whole
    assert named_leaves(names["params"]).keys() == named_leaves(plain).keys()
    factored = [leaf for leaf in jax.tree.leaves(names["params"], is_leaf=is_low_rank) if is_low_rank(leaf)]
    assert len(factored) == 2
    assert jax.tree.map(lambda x: x.shape, names["dense"]) == jax.tree.map(lambda x: x.shape, names["variables"]["params"])


def test_every_key_of_the_config_is_listed(repository):
    text = (repository / "README.md").read_text()
    for key in legal_keys():
        section, _, name = key.rpartition(".")
        assert f"`{key}`" in text or f"`.{name}`" in text, f"{key} is not in the README"
        assert not section or f"`{section}." in text


def test_files_that_the_documentation_refers_to_are_there(repository):
    pages = [repository / "README.md", repository / "CHANGELOG.md", *(repository / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
    for config in (repository / "configs").glob("*.py"):
        for target in re.findall(r"\b(?:docs|scripts|configs)/[\w/]+\.(?:md|sh|py)", config.read_text()):
            assert (repository / target).exists() or target == "configs/vit_s16_i1k.py", f"{config.name}: {target}"
