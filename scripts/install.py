"""Runs pip, and shows in one line how far it is: python scripts/install.py [arguments of pip install]

pip says either nothing for minutes or several hundred lines.  Its last ones are printed if it fails.
"""

import collections
import re
import subprocess
import sys
import time

_EVERY = 30.0  # seconds between lines where nothing can be written over, as in a log


def main() -> int:
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off", *sys.argv[1:]]
    began = told = time.monotonic()
    last: collections.deque[str] = collections.deque(maxlen=30)
    packages: set[str] = set()
    terminal = sys.stdout.isatty()
    print(f"installing {' '.join(sys.argv[1:])}", flush=True)
    with subprocess.Popen(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line)
            if found := re.match(r"(?:Collecting|Requirement already satisfied:) ([\w.-]+)", line):
                packages.add(found[1].lower())
            elif not re.match(r" *(Downloading|Using cached|Building|Installing|Processing)", line):
                continue
            if terminal or time.monotonic() - told > _EVERY:
                told = time.monotonic()
                shown = f"{told - began:4.0f} s  {len(packages)} packages  {line.strip()}"[:100]
                print(f"\r\033[K{shown}" if terminal else shown, end="" if terminal else "\n", flush=True)
    if terminal:
        print("\r\033[K", end="")
    if process.returncode:
        print("".join(last), end="", file=sys.stderr)
    else:
        print(f"installed: {len(packages)} packages in {time.monotonic() - began:.0f} s")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
