"""Writes the metrics of a run: to the console, metrics.jsonl and TensorBoard."""

import concurrent.futures
import contextlib
import errno
import math
from typing import Any

import jax

from lowrank_jax.experiment.best import LOSS, measured
from lowrank_jax.experiment.workdir.metrics import Metrics
from lowrank_jax.experiment.workdir.workdir import Workdir
from lowrank_jax.text import first_line, printable


class Writer:
    """Writes scalars, on process 0; on the others it does nothing.

    Args:
      workdir: of the run.
      part: for another process than training, which writes to PART.jsonl and, for TensorBoard, to PART/ instead.
      board: whether to write for TensorBoard at all.
    """

    def __init__(self, workdir: Workdir, part: str = "", *, board: bool = True):
        self._active = jax.process_index() == 0
        self._metrics = Metrics(workdir.path / f"{part or 'metrics'}.jsonl")
        # clu's writer imports TensorFlow, which takes seconds; a thread does that while the model compiles.
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._folder = str(workdir.path / part)
        self._board = self._thread.submit(_open_board, self._folder) if self._active and board else None

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes a line of metrics.jsonl, and the same to TensorBoard."""
        if not self._active:
            return
        # JSON has no NaN; readers expect null in its place.
        values = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        aside = self._metrics.append({"step": step, **values})
        if aside is not None:
            kept = f"it is kept as {aside}" if aside else "nothing is left of it"
            self.say(f"{self._metrics.path}: another has changed it; {kept}, and a new one begins at step {step}")
        self.show(step, scalars)

    def show_settings(self, settings: dict[str, Any]) -> None:
        """Writes settings for TensorBoard's HParams tab, which compares the runs of a sweep; other values as text."""
        if self._board is not None:
            scalars = {key: _scalar(value) for key, value in settings.items() if value is not None}
            self._thread.submit(lambda board=self._board: board.result().write_hparams(scalars))

    def show(self, step: int, scalars: dict[str, float]) -> None:
        """Writes to TensorBoard alone."""
        if self._board is not None:
            self._thread.submit(lambda board=self._board: board.result().write_scalars(step, scalars))

    def flush(self) -> None:
        """Flushes TensorBoard's file, which is otherwise done with later metrics."""
        if self._board is not None:
            self._thread.submit(lambda board=self._board: board.result().flush())

    def say(self, text: str) -> None:
        """Prints a line, or several."""
        if self._active:
            print(printable(text), flush=True)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: Any) -> None:
        """Waits until everything is written.  Raises OSError if TensorBoard's file cannot be, and nothing else has failed."""
        with contextlib.suppress(OSError) if exception[0] else contextlib.nullcontext():
            self._close()
        self._thread.shutdown()

    def _close(self) -> None:
        if self._board is None:
            return
        try:
            board = self._board.result()
            self._thread.submit(board.close).result()
        except Exception as error:  # of TensorFlow, which has its own for a full disk
            raise OSError(errno.EIO, f"TensorBoard's file cannot be written: {first_line(error)}", self._folder) from None


def _scalar(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _open_board(folder: str) -> Any:
    from clu.metric_writers import SummaryWriter

    return SummaryWriter(folder)


def progress_line(step: int, total: int, scalars: dict[str, float], *, batch_size: int, saved: int | None) -> str:
    """`[ 1200/9380  12.8%] loss 0.4100  top1 0.860  3.1e4 img/s  eta 1m52s  saved@1000`."""
    rate = scalars["train/images_per_second"]
    eta = duration((total - step) * batch_size / rate)
    tail = f"  saved@{saved}" if saved is not None else ""
    metrics = "".join(f"  {name} {scalars[f'train/{name}']:.3f}" for name in measured(scalars, "train/") if name != LOSS)
    return (
        f"[{step:{len(str(total))}}/{total} {100 * step / total:5.1f}%] loss {scalars['train/loss']:.4f}{metrics}"
        f"  {rate:,.0f} img/s  eta {eta}{tail}"
    )


def duration(seconds: float) -> str:
    """3725 -> 1h02m, 112 -> 1m52s, 9 -> 9s."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"
