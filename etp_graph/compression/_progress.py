"""The progress bar."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Bar:
    """Progress bar over the steps of a run. It is shown only if ``show`` is true and stdout is a terminal."""

    def __init__(self, total: int, *, show: bool) -> None:
        console = Console()
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(), console=console, disable=not (show and console.is_terminal), transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total)
        self._done = 0

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, description: str) -> None:
        """Show the description of the step that begins."""
        self._progress.update(self._task, description=description, refresh=True)

    def within(self, share: float) -> None:
        """Show that this share, in [0, 1], of the current step is done."""
        self._progress.update(self._task, completed=self._done + min(max(share, 0.0), 1.0))

    def end(self) -> None:
        """Show that the current step is done."""
        self._done += 1
        self._progress.update(self._task, completed=self._done, refresh=True)
