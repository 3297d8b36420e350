"""How a command ends: errors that the user can fix, exit statuses, and which statuses are worth a restart."""

from lowrank_jax.text import shown

DONE, FAILED, BAD_INPUT, DOES_NOT_FIT, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 4, 75
HUNG_UP, KILLED, TERMINATED = (128 + number for number in (1, 2, 15))  # as shells have it

MEANINGS = {
    DONE: "success",
    FAILED: "some trials of a sweep failed, or an accident, such as memory that ran out on the way",
    BAD_INPUT: "a config, command line, file, work directory or data set cannot be used",
    DOES_NOT_FIT: "preflight: the program does not fit into the memory of the chips",
    DIVERGED: "training diverged: the loss or a gradient is not finite",
    INTERRUPTED: "stopped by Ctrl-C, SIGTERM or SIGHUP after saving; the same command resumes",
    HUNG_UP: "stopped by SIGHUP (a closed terminal) before there was anything to save",
    KILLED: "stopped by Ctrl-C before there was anything to save, or by a second Ctrl-C",
    TERMINATED: "stopped by SIGTERM before there was anything to save",
}

# The sweep engines, the JobSets and scripts/*.sh all follow this; a test holds the scripts to it.
HOPELESS = (BAD_INPUT, DIVERGED)
"""Failures that a restart would only repeat. Nothing restarts these, or success; everything else is worth another try."""


class UserError(Exception):
    """Something that the user can fix; the message says what, and the command exits with `BAD_INPUT`, without a traceback."""


class WorkdirError(UserError):
    """The work directory cannot be used; the message says what to do."""


class InUse(WorkdirError):
    """Another process is doing something in it that only one may do."""


class CheckpointError(UserError):
    """A checkpoint cannot be read or written; the message says which one and why."""


def of_files(error: OSError) -> str:
    """What the system says of a file or folder: there is none, no permission, no space left."""
    return f"{error.filename or 'input or output'}: {error.strerror or error}"


def ended_python(error: BaseException) -> str:
    """What is said of the user's own code that raised SystemExit, or the like."""
    return f"the config, or code that it names, ended Python: {shown(error)}"
