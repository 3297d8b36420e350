"""Figures that a script of docs/results computes one by one, and stores as it goes."""

import argparse
import fcntl
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

RESULTS = pathlib.Path(__file__).parent.parent / "docs" / "results"


class Results:
    """Figures by name in a JSON file of docs/results, which several processes may write."""

    def __init__(self, file: str):
        self._path = RESULTS / file

    def known(self) -> dict[str, Any]:
        return json.loads(self._path.read_text()) if self._path.exists() else {}

    def note(self, name: str, found: dict[str, Any]) -> None:
        with self._path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            known = {**json.loads(file.read() or "{}"), name: found}
            file.truncate(0)
            file.write(json.dumps(known, indent=1, sort_keys=True) + "\n")

    def compute(self, doc: str | None, cases: Iterable[str], of: Callable[[str], dict[str, Any]]) -> None:
        """The command line: computes what is not known yet, or the part of it that is asked for."""
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--part", default="0/1", help="I/N: compute every N-th result, starting from the I-th")
        part, parts = (int(number) for number in parser.parse_args().part.split("/"))
        for name in list(cases)[part::parts]:
            if name in self.known():
                continue
            begin = time.process_time()
            found = of(name)
            self.note(name, found)
            print(
                f"{name}: {1e3 * found.get('seconds', math.inf):.2f} ms ({time.process_time() - begin:.0f} CPU-s)", flush=True
            )
