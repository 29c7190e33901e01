"""What refinements were told, kept until they end: one that was cut off asks nothing twice."""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from searchmerge.errors import EvaluationError, StudyError
from searchmerge.execution.gradient import LossResult
from searchmerge.plan import MergePlan
from searchmerge.search.refine import Refined, Refinement

_SCHEMA = """
CREATE TABLE IF NOT EXISTS loss_answers (
    refinement TEXT NOT NULL, number INTEGER NOT NULL, digest TEXT NOT NULL, result TEXT NOT NULL,
    checksum TEXT NOT NULL, PRIMARY KEY (refinement, number)
)
"""

_FAILURE = "failure"  # the key of why there is no answer


class LossStore:
    """Losses and gradients by refinement, in the order asked, in the file that holds scores.

    Args:
        path: The file, which belongs to the study.

    Raises:
        StudyError: From any method, if the file is damaged or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = sqlite3.connect(path, isolation_level=None)
        with self._errors():
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute(_SCHEMA)

    def n_kept(self, refinement: str) -> int:
        """Return how many answers of a refinement are kept."""
        with self._errors():
            query = "SELECT COUNT(*) FROM loss_answers WHERE refinement = ?"
            return int(self._connection.execute(query, (refinement,)).fetchone()[0])

    def put(
        self, refinement: str, number: int, plan: MergePlan, answer: LossResult | EvaluationError
    ) -> None:
        """Keep what a refinement was told of a plan as its answer of this number."""
        kept = {_FAILURE: str(answer)} if isinstance(answer, EvaluationError) else asdict(answer)
        row = refinement, number, plan.digest, json.dumps(kept)
        with self._errors():
            self._connection.execute(
                "INSERT OR REPLACE INTO loss_answers VALUES (?,?,?,?,?)", (*row, _checksum(row))
            )

    def get(
        self, refinement: str, number: int, plan: MergePlan
    ) -> LossResult | EvaluationError | None:
        """Return the answer of this number; ``None`` if none of this plan is kept."""
        query = (
            "SELECT refinement, number, digest, result, checksum FROM loss_answers "
            "WHERE refinement = ? AND number = ?"
        )
        with self._errors():
            row = self._connection.execute(query, (refinement, number)).fetchone()
        if row is None or row[2] != plan.digest:
            return None
        if row[4] != _checksum(row[:4]):
            raise StudyError(
                f"{self._path}: damaged: answer {number} of refinement {refinement} is not as it "
                "was written; put back a copy of the file, or begin the study anew under another "
                "name"
            )
        kept = json.loads(row[3])
        return EvaluationError(kept[_FAILURE]) if _FAILURE in kept else _result(kept)

    def forget(self, refinement: str) -> None:
        """Drop the answers of a refinement that has ended."""
        with self._errors():
            self._connection.execute(
                "DELETE FROM loss_answers WHERE refinement = ?", (refinement,)
            )

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StudyError(f"{self._path}: losses cannot be kept: {error}") from error


def _checksum(row: tuple[Any, ...]) -> str:
    return hashlib.sha256(json.dumps(row, default=repr).encode()).hexdigest()[:16]


def _result(kept: dict[str, Any]) -> LossResult:
    losses = {task: tuple(values) for task, values in kept["losses"].items()}
    left_out = {
        task: {
            int(example): why for example, why in its.items()
        }  # JSON has no other keys than text
        for task, its in kept.get("left_out", {}).items()
    }
    rows = tuple(map(tuple, kept["rows"]))
    return LossResult(losses, rows, kept["merge_s"], kept["loss_s"], left_out)


def remembered(course: Refinement, store: LossStore, key: str) -> Refinement:
    """Return a refinement that asks only what it was not told before; all answers are kept.

    Args:
        course: The refinement.
        store: Keeps the answers.
        key: Tells the refinement from all others.
    """
    number = 0
    try:
        ask = next(course)
        while True:
            answer = store.get(key, number, ask[0])
            if answer is None:
                try:
                    answer = yield ask
                except EvaluationError as error:
                    answer = error
                store.put(key, number, ask[0], answer)
            number += 1
            if isinstance(answer, EvaluationError):
                ask = course.throw(answer)
            else:
                ask = course.send(answer)
    except StopIteration as ended:
        refined: Refined | None = ended.value
        return refined
    finally:
        course.close()
