"""What each worker of a study is at and has done, kept in a file that ``status`` reads."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchmerge.durable import read_checked, with_checksum, write_atomically
from searchmerge.errors import StudyError
from searchmerge.execution.executor import Executor
from searchmerge.execution.worker import RoundResult

ROSTER_FILE = "workers.json"
_KEEP_S = 5.0  # how often it is written


@dataclass(slots=True)
class _Work:
    """What a worker has done.

    Attributes:
        trials: Trials that it brought to their end.
        examples: Examples that it scored, of references and in the confirmation too.
        seconds: How long it merged and scored.
    """

    trials: int = 0
    examples: int = 0
    seconds: float = 0.0

    def told(self) -> dict[str, Any]:
        """Return it as it is kept."""
        rate = self.examples / self.seconds if self.seconds else 0.0
        return {
            "trials": self.trials,
            "examples": self.examples,
            "examples_per_s": round(rate, 3),
        }


class Roster:
    """Counts what the workers of an executor do, and keeps that every few seconds.

    Args:
        executor: Whose workers they are.
        run_dir: Where the file is; ``None`` to keep nothing.
        now: Returns the present second, on any clock that never goes back.
    """

    def __init__(
        self,
        executor: Executor,
        run_dir: Path | None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._file = run_dir and run_dir / ROSTER_FILE
        self._now = now
        self._kept_at = -_KEEP_S
        self._at: dict[int, _Work] = {}
        self._work: dict[str, _Work] = {}

    def began(self, job: int) -> None:
        """Take note of which worker was given a job."""
        for worker in self._executor.workers():
            if worker.job == job:
                self._at[job] = self._work.setdefault(worker.name, _Work())

    def scored(self, job: int, result: RoundResult) -> None:
        """Count a round that a job's worker scored."""
        work = self._at[job]
        work.examples += sum(len(scores.block.examples) for scores in result.scores)
        work.seconds += result.seconds

    def ended(self, job: int, *, is_trial: bool) -> None:
        """Take note that a job is no longer its worker's.

        Args:
            job: Its number.
            is_trial: Whether it was a trial, and this worker brought it to its end.
        """
        self._at.pop(job).trials += is_trial

    def keep(self, *, at_once: bool = False) -> None:
        """Write the file, unless that was done a moment ago.

        Args:
            at_once: Whether it is written in any case.

        Raises:
            StudyError: If it cannot be written.
        """
        is_due = at_once or self._now() - self._kept_at >= _KEEP_S
        if self._file is None or not is_due:
            return
        self._kept_at = self._now()
        try:
            kept = {"at": time.time(), "workers": self._rows()}
            write_atomically(self._file, with_checksum(kept))
        except OSError as error:
            raise StudyError(
                f"{self._file}: cannot be written: {error.strerror or error}"
            ) from error

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "name": worker.name,
                "node": worker.node,
                "device": worker.device,
                "doing": worker.doing,
                **self._work.get(worker.name, _Work()).told(),
            }
            for worker in self._executor.workers()
        ]


def read_roster(run_dir: Path) -> tuple[list[dict[str, Any]], float | None]:
    """Return the workers as they were kept last, and how many seconds ago that was.

    None are returned, and ``None``, where a study has not got so far.

    Raises:
        StudyError: If the file is damaged.
    """
    file = run_dir / ROSTER_FILE
    try:
        kept = read_checked(file)
    except FileNotFoundError:
        return [], None
    except (OSError, ValueError) as error:
        raise StudyError(f"{file}: damaged: {error}; remove it") from error
    return kept["workers"], max(0.0, time.time() - kept["at"])
