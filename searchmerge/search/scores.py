"""The score cache: every block that was ever scored, kept as soon as it is known."""

import contextlib
import hashlib
import json
import os
import sqlite3
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from searchmerge.errors import StudyError
from searchmerge.evaluators.evaluator import Answer
from searchmerge.execution.blocks import (
    Block,
    BlockKey,
    BlockScores,
    BlockValues,
    Part,
    Round,
)
from searchmerge.plan import MergePlan

_SCHEMA = """
CREATE TABLE IF NOT EXISTS plans (digest TEXT PRIMARY KEY, plan TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS scores (
    digest TEXT NOT NULL, task TEXT NOT NULL, part TEXT NOT NULL, block INTEGER NOT NULL,
    vals TEXT NOT NULL, grades TEXT NOT NULL, checksum TEXT NOT NULL,
    PRIMARY KEY (digest, task, part, block)
);
CREATE TABLE IF NOT EXISTS answers (
    digest TEXT NOT NULL, task TEXT NOT NULL, part TEXT NOT NULL, example INTEGER NOT NULL,
    answer TEXT NOT NULL, PRIMARY KEY (digest, task, part, example)
);
CREATE TABLE IF NOT EXISTS study (spec TEXT NOT NULL);
"""

_MAX_CACHED = 256  # plans kept in memory; more than there are workers


class ScoreStore:
    """Block scores by plan, in an SQLite file that belongs to one study.

    A plan that was scored on a block is never scored on it again: the study's fingerprint
    guards the file, so equal plans have equal scores. Every row has a checksum.

    Args:
        path: The file; made where there is none.

    Raises:
        StudyError: From any method, if the file is damaged, or is none of these.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = sqlite3.connect(path, isolation_level=None)
        try:
            with self._read_errors():
                self._connection.execute("PRAGMA journal_mode=WAL")
                self._connection.execute("PRAGMA synchronous=NORMAL")  # outlives a kill alone
                self._connection.executescript(_SCHEMA)
                self._connection.execute("SELECT checksum, grades FROM scores LIMIT 0")
        except StudyError:
            self._connection.close()
            raise
        self._cached: OrderedDict[str, _Scored] = OrderedDict()

    def claim(self, spec: str) -> None:
        """Let the file belong to a study; its scores are those of no other.

        Args:
            spec: All that may change a score. The study's storage keeps it too, and may have
                been lost or replaced since.

        Raises:
            StudyError: If there are scores of another study.
        """
        with self._read_errors():
            row = self._connection.execute("SELECT spec FROM study").fetchone()
            if row is None and not self.plans():
                self._connection.execute("INSERT INTO study VALUES (?)", (spec,))
                row = (spec,)
        if row is None or row[0] != spec:
            raise StudyError(
                f"{self._path}: holds scores of another study, or of other models or tasks than "
                "these; give the study another name or run directory"
            )

    def plans(self) -> frozenset[str]:
        """Return the digests of all plans that have scores."""
        with self._read_errors():
            return frozenset(d for (d,) in self._connection.execute("SELECT digest FROM plans"))

    def put(self, plan: MergePlan, scores: Iterable[BlockScores]) -> None:
        """Keep a round's scores, all of them or none.

        Raises:
            StudyError: If the file cannot be written, e.g. because the disk is full.
        """
        scores = list(scores)
        entries = [
            _signed(plan.digest, *s.block.key, json.dumps(s.values), json.dumps(s.grades))
            for s in scores
        ]
        answers = [
            (plan.digest, s.block.task, s.block.part, answer.example, json.dumps(asdict(answer)))
            for s in scores
            for answer in s.answers
        ]
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute(
                "INSERT OR IGNORE INTO plans VALUES (?, ?)",
                (plan.digest, json.dumps(plan.to_dict())),
            )
            self._connection.executemany(
                "INSERT OR REPLACE INTO scores VALUES (?,?,?,?,?,?,?)", entries
            )
            self._connection.executemany(
                "INSERT OR REPLACE INTO answers VALUES (?,?,?,?,?)", answers
            )
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise StudyError(f"{self._path}: scores cannot be written: {error}") from error
        scored = self._of(plan.digest)
        scored.values.update({s.block.key: s.values for s in scores})
        scored.grades.update({s.block.key: s.grades for s in scores})

    def get(self, plan: MergePlan) -> BlockValues:
        """Return all that is known of ``plan``: block key to its values."""
        return self._of(plan.digest).values

    def grades(self, plan: MergePlan) -> BlockValues:
        """Return how clearly ``plan`` answered: block key to its grades, which may be none."""
        return self._of(plan.digest).grades

    def missing(self, plan: MergePlan, rounds: Sequence[Round]) -> tuple[Round, ...]:
        """Return the rounds that still have to be scored, whole, in order.

        A held-out block whose answers are to be kept is scored again where they were not.
        """
        scored = self.get(plan)
        wanted = [b for r in rounds for b in r if b.part == "hold_out" and b.n_answers]
        answered = self._answered(plan.digest, "hold_out") if wanted else set()
        unanswered = {
            block.key
            for block in wanted
            if not {(block.task, example) for example in block.examples} <= answered
        }
        return tuple(
            r for r in rounds if any(b.key not in scored or b.key in unanswered for b in r)
        )

    def _answered(self, digest: str, part: Part) -> set[tuple[str, int]]:
        query = "SELECT task, example FROM answers WHERE digest = ? AND part = ?"
        with self._read_errors():
            return set(self._connection.execute(query, (digest, part)))

    def answers(self, plan: MergePlan, task: str, part: Part) -> tuple[Answer, ...]:
        """Return what is kept of what a plan said to a task's examples, by example."""
        with self._read_errors():
            entries = self._connection.execute(
                "SELECT answer FROM answers WHERE digest = ? AND task = ? AND part = ? "
                "ORDER BY example",
                (plan.digest, task, part),
            ).fetchall()
        answers = [json.loads(text) for (text,) in entries]
        return tuple(
            Answer(**{**a, "said": tuple(a["said"]), "read": tuple(a["read"])}) for a in answers
        )

    def task_values(self, plan: MergePlan, blocks: Sequence[Block]) -> tuple[float, ...]:
        """Return the values of one task's blocks, one after the other.

        Raises:
            KeyError: If a block was not scored.
        """
        scored = self.get(plan)
        return tuple(value for block in blocks for value in scored[block.key])

    def flush(self) -> None:
        """Make what was put outlive a power cut, so that no finished trial is without scores.

        Raises:
            StudyError: If the file cannot be written.
        """
        log = self._path.with_name(f"{self._path.name}-wal")
        try:
            with log.open("rb") as file:
                os.fsync(file.fileno())
        except FileNotFoundError:
            return  # all of it is in the file itself, which SQLite has flushed
        except OSError as error:
            raise StudyError(f"{log}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _of(self, digest: str) -> "_Scored":
        if digest in self._cached:
            self._cached.move_to_end(digest)
            return self._cached[digest]
        with self._read_errors():
            entries = self._connection.execute(
                "SELECT digest, task, part, block, vals, grades, checksum FROM scores "
                "WHERE digest = ?",
                (digest,),
            ).fetchall()
        scored = _Scored({}, {})
        for entry in entries:
            scored.values[entry[1:4]], scored.grades[entry[1:4]] = self._numbers(entry)
        self._cached[digest] = scored
        if len(self._cached) > _MAX_CACHED:
            self._cached.popitem(last=False)
        return self._cached[digest]

    def _numbers(self, entry: tuple[Any, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the values and the grades of a row."""
        _, task, part, block, values, grades, _ = entry
        if entry != _signed(*entry[:6]):
            raise StudyError(
                f"{self._path}: damaged: the scores of block {block} of task {task!r} ({part}) "
                "are not as they were written; put back a copy of the file, or begin the study "
                "anew under another name"
            )
        return tuple(json.loads(values)), tuple(json.loads(grades))

    @contextlib.contextmanager
    def _read_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StudyError(
                f"{self._path}: cannot be used ({error}); if it is damaged put back a copy, or "
                "begin the study anew under another name"
            ) from error


class _Scored(NamedTuple):
    """What is known of a plan, by block.

    Attributes:
        values: What the blocks scored.
        grades: How clearly their examples were answered.
    """

    values: dict[BlockKey, tuple[float, ...]]
    grades: dict[BlockKey, tuple[float, ...]]


def _signed(
    digest: str, task: str, part: str, block: int, values: str, grades: str
) -> tuple[Any, ...]:
    """Return a row with the checksum of all that stands in it."""
    row = digest, task, part, block, values, grades
    text = json.dumps(row, default=repr)  # bytes: damaged
    return *row, hashlib.sha256(text.encode()).hexdigest()[:16]
