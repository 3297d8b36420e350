"""Work directories that are not what they seem: copied, renamed, damaged and foreign checkpoints, scores and metrics."""

import shutil

from scripts.hostile.harness import Kind, Place, tidy, top1

KIND = Kind("checkpoints")


def _same_end(place: Place, run) -> None:
    """Asserts that the run goes on to the result of one that was never disturbed."""
    tidy(place.train(run))
    expected = top1(place.package.prepared("finished"))
    assert top1(run) == expected, f"ended with {top1(run)}, not {expected}"


@KIND.attempts({"80 as 120": (80, 120), "100 as 110": (100, 110), "80 as 100": (80, 100), "100 as 80": (100, 80)})
def a_step_copied_to_another_number(place: Place, old: int, new: int) -> None:
    run = place.copy("halted")
    shutil.rmtree(run / "checkpoints" / str(new), ignore_errors=True)
    shutil.copytree(run / "checkpoints" / str(old), run / "checkpoints" / str(new))
    _same_end(place, run)


@KIND.attempt
def nothing(place: Place) -> None:
    _same_end(place, place.copy("halted"))
