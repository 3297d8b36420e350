"""Imports the package once and runs its commands in forks.  Reads a JSON object a line, and answers with the status."""

import importlib
import json
import os
import runpy
import signal
import sys
import time

for name in ("training.loop", "evaluation.evaluator", "report.page", "sweep.trials"):
    importlib.import_module(f"lowrank_jax.experiment.{name}")


def run(request: dict) -> int | None:
    """The exit status, a signal as a number below 0, or None if the command did not end in time."""
    child = os.fork()
    if not child:
        command(request)
    end = time.monotonic() + request["timeout"]
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def command(request: dict) -> None:
    os.setsid()
    os.chdir(request["cwd"])
    for number, key in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[key], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["lowrank", *request["arguments"]]
    status = 1
    try:
        runpy.run_module("lowrank_jax", run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


for line in sys.stdin:
    print(json.dumps({"status": run(json.loads(line))}), flush=True)
