"""Showing a run to a person: a bar in a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from searchmerge.errors import printable
from searchmerge.search.trials import TrialRecord
from searchmerge.wording import counted


class ProgressView:
    """One line for every reference, trial and phase; in a terminal with a bar below them.

    Args:
        console: Where to print.
        crowding: Says in a few words that others use the workers' machine too, or nothing.
    """

    def __init__(self, console: Console, *, crowding: Callable[[], str] = str) -> None:
        self._console = console
        self._crowding = crowding
        self._start = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def phase(self, title: str, total: int | None, done: int = 0) -> None:
        """Say that a phase begins."""
        behind = f", {done} done before" if done else ""
        self._line(f"{title}" + (f" ({total}{behind})" if total else behind))
        self._bar.reset(self._task, description=title, total=total, completed=done)

    def step(self, name: str, scores: Mapping[str, float]) -> None:
        """Show the scores of a reference or a candidate."""
        self._line(f"  {name:24} {_scores(scores)}")
        self._bar.advance(self._task)

    def trial(self, record: TrialRecord, *, is_best: bool) -> None:
        """Show what became of a trial."""
        self._bar.advance(self._task)
        name = f"  {record.name}"
        marks = [f"trial {record.repeats} again"] if record.repeats is not None else []
        if record.value is None:
            self._line(f"{name:12} failed{' again' if marks else ''}: {record.failure}")
            return
        marks += [record.kind] if record.kind else []
        if record.stopped_after is not None:
            marks.append(f"stopped after {counted(record.stopped_after, 'block')}")
        if is_best:
            marks.append("best so far")
        if crowded := self._crowding():
            marks.append(crowded)
        line = f"{name:12} {record.value:.4f}  {_scores(record.scores)}  {record.seconds:5.1f} s"
        self._line(f"{line}  {', '.join(marks)}".rstrip())

    def _line(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
        self._bar.console.print(
            f"{minutes:3d}:{seconds:02d} {printable(text)}",
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=True,
        )


def _scores(scores: Mapping[str, float]) -> str:
    return "  ".join(f"{task} {score:.3f}" for task, score in scores.items())
