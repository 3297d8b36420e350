"""`lowrank predict`: the likeliest classes of image files."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowrank_jax.experiment.cli.output import complain, say, written_at_the_end
from lowrank_jax.experiment.errors import BAD_INPUT, DONE, UserError
from lowrank_jax.text import one_line

if TYPE_CHECKING:
    from lowrank_jax.experiment.evaluation.predictions import Prediction

_TOP = 5
_WIDEST = 60  # column of file names


def predict(args: argparse.Namespace) -> int:
    """Prints a line for each file, or writes files that hold them."""
    from lowrank_jax.experiment.data import image_files, progress
    from lowrank_jax.experiment.evaluation import predictions, trained
    from lowrank_jax.experiment.evaluation.results import as_json

    found, others = image_files.find(args.images)
    if not found:
        raise UserError(f"{', '.join(args.images)}: no image files there ({', '.join(image_files.SUFFIXES)})")
    for flag, name in (("--csv", args.csv), ("--json", args.json)):
        if name and image_files.is_image(name):
            raise UserError(f"{flag}={name} would overwrite an image; name a file such as predictions.{flag.strip('-')}")
    trusted = args.trust_code or []
    network = trained.restore(args.workdir, args.step, raw=args.raw, trust_code=True in trusted or trusted)
    for line in network.warnings():
        complain(f"{args.workdir}: {line}")
    quiet = bool(args.csv or args.json)
    width = min(_WIDEST, max(len(one_line(file)) for file in found))
    done, told = [], progress.Progress("predicting", len(found), complain if quiet else lambda line: None)
    with written_at_the_end(args.csv) as table, written_at_the_end(args.json) as objects:
        for prediction in predictions.of_files(network, found, _TOP):
            done.append(prediction)
            if prediction.error:
                complain(f"{prediction.file}: {prediction.error}")
            elif not quiet:
                say(prediction.line(width))
            told.at(len(done))
        table.write(predictions.table(done, _TOP))
        objects.write(as_json([prediction.record() for prediction in done]))
    failed = sum(bool(prediction.error) for prediction in done)
    for line in _notes(done, failed, others):
        complain(line)
    for path in filter(None, (args.csv, args.json)):
        say(f"{len(done) - failed:,} images: {path}")
    return BAD_INPUT if failed else DONE


def _notes(done: "Sequence[Prediction]", failed: int, others: int) -> list[str]:
    """What is worth knowing of the images, and was not said of each."""
    changed = [prediction for prediction in done if prediction.changed]
    lines = []
    if changed:
        first, were = changed[0], "was changed before it was" if len(changed) == 1 else "were changed before they were"
        lines.append(f"{len(changed):,} of {len(done):,} images {were} predicted: {first.file} was {first.changed}")
    if others:
        files = "file in the folders was" if others == 1 else "files in the folders were"
        lines.append(f"{others:,} other {files} passed over")
    if failed:
        lines.append(f"{failed:,} of {len(done):,} images cannot be read")
    return lines
