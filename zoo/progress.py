"""What a training run shows while it runs: a bar on a terminal, lines elsewhere."""

import math
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["Reporter", "say"]

_LONG = 10  # rows of the log in an epoch from which each is a line


class Reporter:
    """Shows the progress of a run.

    Args:
        console: where to; whether it is a terminal decides between bar and lines. ``None`` shows nothing.
        total: steps of the whole run.
        done: steps of it that an earlier session has done.
        log_every: steps between two rows of the log.

    Example:
        >>> import sys
        >>> from rich.console import Console
        >>> figures = {"train_loss": 1.5, "loss": 1.2, "top1": 60.0, "images_per_second": 900.0}
        >>> with Reporter(Console(file=sys.stdout, force_terminal=False), total=44) as reporter:  # no bar
        ...     reporter.at(22)
        ...     reporter.epoch({"epoch": 1, **figures}, epochs=2)
        epoch 1/2  loss 1.5000  validation 1.2000  top-1  60.00%  900 images/s
    """

    def __init__(self, console: Console | None, *, total: int, done: int = 0, log_every: int = 100) -> None:
        self.console, self._log_every = console, log_every
        self._bar: Progress | None = None
        if console is not None and console.is_terminal:
            # The narrower the terminal, the fewer columns; time left stays.
            texts = [TextColumn("{task.fields[epoch]}"), BarColumn(bar_width=None, table_column=None)]
            if console.width >= 40:
                texts.append(TextColumn("{task.fields[loss]}"))
            if console.width >= 70:
                texts += [TextColumn("{task.fields[top1]}"), TextColumn("{task.fields[speed]}")]
            self._bar = Progress(*texts, TimeRemainingColumn(compact=True), console=console, transient=True)
            self._task = self._bar.add_task("", total=total, completed=done, epoch="", loss="", top1="", speed="")

    def __enter__(self) -> "Reporter":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def at(self, done: int) -> None:
        """Shows how many steps are done."""
        if self._bar:
            self._bar.update(self._task, completed=done)

    def row(self, row: dict[str, Any], *, epochs: int, per_epoch: int) -> None:
        """Shows the figures of the last steps: in the bar, or as a line where an epoch is long."""
        if self._bar:
            self._bar.update(
                self._task,
                epoch=f"epoch {row['epoch']}/{epochs}",
                loss=f"loss {_number(row['loss']):.3f}",
                top1=f"top-1 {_number(row['top1']):.1f}%",
                speed=f"{row['images_per_second']:.0f} images/s",
            )
        elif per_epoch >= _LONG * self._log_every:
            loss, top1 = _number(row["loss"]), _number(row["top1"])
            self.say(
                f"step {row['step']}  epoch {row['epoch']}/{epochs}  lr {row['lr']:.2e}  loss {loss:.4f}  "
                f"top-1 {top1:.2f}%  {row['images_per_second']:.0f} images/s  waiting {row['waiting']:.0%}"
            )

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """Says how an epoch went, on one line."""
        width = len(str(epochs))
        average = f"  averaged {row['ema_top1']:6.2f}%" if "ema_top1" in row else ""
        self.say(
            f"epoch {row['epoch']:{width}}/{epochs}  loss {_number(row['train_loss']):.4f}  "
            f"validation {_number(row['loss']):.4f}  top-1 {row['top1']:6.2f}%{average}  "
            f"{row['images_per_second']:.0f} images/s"
        )

    def say(self, line: str) -> None:
        """Prints a line as it is."""
        if self.console is not None:
            say(self.console, line)

    def table(self, title: str, cells: dict[str, str]) -> None:
        """Prints names and values in two columns."""
        if self.console is None:
            return
        table = Table("", "", title=title, show_header=False, title_justify="left")
        for name, value in cells.items():
            table.add_row(name, value)
        self.console.print(table)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def say(console: Console, line: str) -> None:
    """Prints a line as it is, whatever brackets are in it, and lets the terminal break it.

    Example:
        >>> import sys
        >>> say(Console(file=sys.stdout), "[ok] done")
        [ok] done
    """
    console.print(line, markup=False, highlight=False, soft_wrap=True)
