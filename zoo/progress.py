"""What a training run shows while it runs: a bar on a terminal, a line per epoch elsewhere."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["Reporter", "say"]


class Reporter:
    """Shows the progress of a run.

    Args:
        console: where to; whether it is a terminal decides between bar and lines.
        total: steps of the whole run.
        done: steps of it that an earlier session has done.
    """

    def __init__(self, console: Console, *, total: int, done: int = 0) -> None:
        self.console = console
        self._bar: Progress | None = None
        if console.is_terminal:
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

    @property
    def live(self) -> bool:
        """Whether figures between the epochs are shown, and so worth reading from the device."""
        return self._bar is not None

    def step(self, done: int, *, epoch: str, loss: float, top1: float, speed: float) -> None:
        """Shows where the run is and the epoch's means so far."""
        if self._bar:
            self._bar.update(
                self._task,
                completed=done,
                epoch=epoch,
                loss=f"loss {loss:.3f}",
                top1=f"top-1 {top1:.1f}%",
                speed=f"{speed:.0f} images/s",
            )

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """Says how an epoch went, on one line."""
        width = len(str(epochs))
        self.say(
            f"epoch {row['epoch']:{width}}/{epochs}  loss {row['train_loss']:.4f}  "
            f"validation {row['loss']:.4f}  top-1 {row['top1']:6.2f}%  {row['images_per_second']:.0f} images/s"
        )

    def say(self, line: str) -> None:
        """Prints a line as it is."""
        say(self.console, line)

    def table(self, title: str, cells: dict[str, str]) -> None:
        """Prints names and values in two columns."""
        table = Table("", "", title=title, show_header=False, title_justify="left")
        for name, value in cells.items():
            table.add_row(name, value)
        self.console.print(table)


def say(console: Console, line: str) -> None:
    """Prints a line as it is, whatever brackets are in it, and lets the terminal break it."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
