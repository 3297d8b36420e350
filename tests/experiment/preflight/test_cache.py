from lowrank_jax.experiment.preflight.cache import Cache
from lowrank_jax.experiment.preflight.compiler import Cost, Program


def test_an_answer_that_cannot_be_read_is_asked_for_again(tmp_path):
    cache = Cache(tmp_path / "new")
    programs = {
        "whole": Program(5, Cost(1.0, 2.0, None, "it has none", {"all-reduce": 4}), 0.5),
        "refused": Program(7, None, 0.25),
    }
    for key, program in programs.items():
        cache.put(key, program)
        assert cache.get(key) == program
    (tmp_path / "new" / "whole.json").write_text('{"peak_bytes"')
    (tmp_path / "new" / "refused.json").write_text("{}")
    assert cache.get("whole") is cache.get("refused") is cache.get("other") is None
    assert Cache(None).get("whole") is None
