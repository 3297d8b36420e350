"""Tries to break the package, and prints how many tries of each kind it held.

    python -m scripts.hostile                                # all kinds
    python -m scripts.hostile --kinds=checkpoints --only='symlink|copied'
    python -m scripts.hostile --package=../old               # the same tries against another checkout

Takes minutes.  Exits with 1 if anything broke, and says what.
"""

import argparse
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.hostile import checkpoints, intruders, messages, reports, signals  # noqa: F401 (reports belong to two kinds)
from scripts.hostile.harness import ROOT, Kind, Package, Place

KINDS = {module.KIND.name: module.KIND for module in (checkpoints, intruders, messages, signals)}


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        package = Package(args.package.resolve(), Path(scratch))
        try:
            outcomes = list(_outcomes([KINDS[name] for name in args.kinds], args.only, package, args.jobs))
        finally:
            package.close()
    held, tried = (Counter(kind for kind, broke in outcomes if not (only_held and broke)) for only_held in (True, False))
    print("\n| kind | tried | held |\n| --- | --- | --- |")
    for kind in args.kinds:
        print(f"| {kind} | {tried[kind]} | {held[kind]} |")
    sys.exit(held != tried)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.hostile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--only", default="", metavar="REGEX", help="tries whose name matches")
    parser.add_argument("--package", type=Path, default=ROOT, metavar="DIR", help="checkout to try; default: this one")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="tries at the same time; default: 2")
    args = parser.parse_args()
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"unknown kinds: {', '.join(unknown)}")
    return args


def _outcomes(kinds: Iterable[Kind], only: str, package: Package, jobs: int) -> Iterable[tuple[str, str]]:
    """Kind and what broke, "" if nothing did, of every try; prints a line for each that broke."""
    chosen = [(kind, name) for kind in kinds for name in kind.tries if re.search(only, name)]
    with ThreadPoolExecutor(jobs) as pool:
        for (kind, name), broke in zip(chosen, pool.map(lambda each: _broke(each[0], each[1], package), chosen), strict=True):
            print(f"{'BROKE' if broke else 'held '}  {kind.name}: {name}{f': {broke}' if broke else ''}", flush=True)
            yield kind.name, broke


def _broke(kind: Kind, name: str, package: Package) -> str:
    """Why a try broke; "" if it held."""
    with tempfile.TemporaryDirectory(prefix="try-", dir=package.scratch) as folder:
        try:
            kind.tries[name](Place(Path(folder), package))
        except Exception as error:  # whatever a broken package leads to
            return f"{type(error).__name__}: {error}".replace("AssertionError: ", "")
    return ""


if __name__ == "__main__":
    main()
