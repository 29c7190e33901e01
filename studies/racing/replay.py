"""Replay recorded scores under racing rules: what each saves, and what it costs.

python replay.py [quickstart.npz encoder.npz] [--runs 200]

A run draws which examples select and which are held out, and the order of the candidates. Every
rule then sees the same run. Printed per rule: how many times fewer examples were scored than
without racing; how often the best candidate of the full select scores was stopped (and none as
good was left); the regret of the confirmed winner, which is the best candidate's objective on all
examples minus the winner's, in points; and how much that is more than without racing, with its
standard error. The winner is the best on held-out examples of the top 3, which are scored in full
at the end where they were stopped.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import wilcoxon

from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.blocks import (
    Block,
    BlockKey,
    BlockValues,
    Round,
    make_blocks,
    telling_first,
)
from searchmerge.search.incumbents import Incumbents
from searchmerge.search.objective import Goal, Objective
from searchmerge.search.racing import Incumbent, Racing
from searchmerge.search.references import BASE, expert_name
from searchmerge.search.schedule import Places, Schedule
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.trials import TrialRecord

HERE = Path(__file__).resolve().parent
BLOCK_SIZE = 8
TOP_K = 3

Table = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SignedRank:
    """A signed-rank test of the block means, in units of the objective; in the place of Racing."""

    p_threshold: float

    def stops(
        self,
        objective: Objective,
        places: Places,
        observed: BlockValues,
        incumbents: Sequence[Incumbent],
        base: object,
    ) -> bool:
        """Return whether the blocks seen are worse with confidence."""
        if not incumbents or len(observed) < BLOCK_SIZE:
            return False
        best = incumbents[0].plan
        theirs = {
            key: best.values[task][place].mean()
            for task, blocks in places.items()
            for key, place in blocks.items()
        }
        differences = np.array(
            [
                objective.unit(key[0]) * (np.mean(values) - theirs[key])
                for key, values in observed.items()
            ]
        )
        if differences.mean() >= 0:
            return False
        test = wilcoxon(differences, alternative="less", zero_method="zsplit", method="asymptotic")
        return bool(test.pvalue < self.p_threshold)


RULES = {
    "signed rank, p 0.05": (SignedRank(0.05), "random"),
    "signed rank, p 0.1": (SignedRank(0.1), "random"),
    "predicted, p 0.05, blocks at random": (Racing(0.05), "random"),
    **{f"predicted, p {p}": (Racing(p), "informed") for p in (0.02, 0.03, 0.05, 0.1)},
}


@dataclass(frozen=True)
class Recording:
    """What a study's plans scored: one row per plan, references first."""

    rows: list[str]
    n_references: int
    goals: dict[str, Goal]
    scores: dict[str, Table]

    @classmethod
    def load(cls, path: Path) -> "Recording":
        """Read what record.py wrote."""
        with np.load(path) as data:
            meta = json.loads(str(data["meta"]))
            goals = {task: Goal(*goal) for task, goal in meta["goals"].items()}
            scores = {task: data[task].astype(float) for task in goals}
        return cls(meta["rows"], meta["n_references"], goals, scores)

    def objective(self, examples: Mapping[str, npt.NDArray[np.int64]]) -> Objective:
        """Return the normalised objective on some examples."""
        own = {
            task: float(
                self.scores[task][self.rows.index(expert_name(str(goal.expert)))][e].mean()
            )
            for (task, goal), e in zip(self.goals.items(), examples.values(), strict=True)
        }
        return Objective("normalised", self.goals, own)

    def values(self, examples: Mapping[str, npt.NDArray[np.int64]]) -> Table:
        """Return every plan's objective on some examples."""
        goal = self.objective(examples)
        means = {task: self.scores[task][:, e].mean(1) for task, e in examples.items()}
        return np.array(
            [
                goal.scalar({task: float(own[row]) for task, own in means.items()})
                for row in range(len(self.rows))
            ]
        )


@dataclass(frozen=True)
class Row:
    """One recorded plan."""

    index: int

    @property
    def digest(self) -> int:
        """What the plan is told from others by."""
        return self.index


class Scores:
    """Stands for a study's score store: what was shown of each row so far."""

    def __init__(self, tables: Mapping[str, Table]) -> None:
        self._tables = tables
        self._shown: dict[Row, dict[BlockKey, tuple[float, ...]]] = {}

    def show(self, row: Row, blocks: Sequence[Block]) -> int:
        """Put down what a row scored on blocks; return how many examples that were."""
        shown = self._shown.setdefault(row, {})
        for block in blocks:
            shown[block.key] = tuple(self._tables[block.task][row.index][list(block.examples)])
        return sum(len(block.examples) for block in blocks)

    def get(self, row: Row) -> BlockValues:
        """Return what was shown of a row."""
        return self._shown.get(row, {})

    def missing(self, row: Row, rounds: Sequence[Round]) -> list[Round]:
        """Return the rounds that were not shown whole."""
        shown = self.get(row)
        return [blocks for blocks in rounds if any(block.key not in shown for block in blocks)]

    def task_values(self, row: Row, blocks: Sequence[Block]) -> tuple[float, ...]:
        """Return the values of one task's blocks, one after the other."""
        shown = self.get(row)
        return tuple(value for block in blocks for value in shown[block.key])


class Run:
    """One drawing of examples and candidates, that every rule sees alike.

    Args:
        recording: What was scored.
        seed: Of the drawing.
        n_select: Examples of each task that candidates are scored on; the rest is held out.
        round_blocks: Blocks that are scored before a rule is asked.
    """

    def __init__(self, recording: Recording, seed: int, n_select: int, round_blocks: int) -> None:
        generator = np.random.default_rng(seed)
        orders = {t: generator.permutation(s.shape[1]) for t, s in recording.scores.items()}
        hold_out = {task: order[n_select:] for task, order in orders.items()}
        select = {task: order[:n_select] for task, order in orders.items()}
        self._recording = recording
        self._tables = recording.scores
        self._candidates = [
            Row(int(row))
            for row in generator.permutation(
                np.arange(recording.n_references, len(recording.rows))
            )
        ]
        self._on_select = recording.values(select)
        self._on_hold_out = recording.values(hold_out)
        self._truth = recording.values(orders)
        self._goal = recording.objective(select)
        info = TaskInfo(n_select)
        cuts: dict[str, dict[str, tuple[Block, ...]]] = {"random": {}, "informed": {}}
        for task, examples in select.items():
            blocks = make_blocks(task, "select", [int(e) for e in examples], info, BLOCK_SIZE)
            cuts["random"][task] = blocks
            scored = [
                dict(enumerate(row)) for row in self._tables[task][1 : recording.n_references]
            ]
            cuts["informed"][task] = telling_first(blocks, scored, "select")
        self._schedules = {
            cut: Schedule.interleaved(
                dict.fromkeys(select, info),
                {"select": blocks},
                round_blocks=round_blocks,
                seed=None,
            )
            for cut, blocks in cuts.items()
        }

    def without(self) -> tuple[int, bool, float]:
        """Return how many examples are scored without racing, and the regret."""
        n_select = self._schedules["random"].n_examples("select")
        expected = {row: self._on_select[row.index] for row in self._candidates}
        return n_select * len(expected), False, self._regret(self._top(expected))

    def under(self, rule: Racing | SignedRank, cut: str) -> tuple[int, bool, float]:
        """Return how many examples a rule scores, if it loses the best, and the regret."""
        scores = Scores(self._tables)
        board = Scoreboard(self._schedules[cut], scores)
        every_block = [block for blocks in board.schedule.rounds["select"] for block in blocks]
        references = [Row(i) for i in range(self._recording.n_references)]
        for row in references:
            scores.show(row, every_block)
        alone = {BASE, *(expert_name(str(g.expert)) for g in self._recording.goals.values())}
        incumbents = Incumbents(
            board,
            self._goal,
            rule,
            base=references[self._recording.rows.index(BASE)],
            pool=[row for row in references if self._recording.rows[row.index] not in alone],
        )
        n_scored, best_full, expected = 0, -np.inf, {}
        for row in self._candidates:
            n_scored += self._race(row, incumbents, scores)
            outcome, stopped_after = incumbents.outcome(row)
            if stopped_after is None:
                incumbents.enter(TrialRecord(row.index, row).judged(self._goal, outcome))
                expected[row] = self._on_select[row.index]
                best_full = max(best_full, expected[row])
            else:
                expected[row] = self._goal.scalar(outcome)
        top = self._top(expected)
        for row in top:
            for blocks in board.missing(row, "select"):
                n_scored += scores.show(row, blocks)
        best = max(self._on_select[row.index] for row in self._candidates)
        return n_scored, bool(best > best_full + 1e-12), self._regret(top)

    def _race(self, row: Row, incumbents: Incumbents, scores: Scores) -> int:
        n_scored = 0
        for blocks in incumbents.rounds():
            if n_scored and incumbents.best is not None and not incumbents.may_win(row):
                break
            n_scored += scores.show(row, blocks)
        return n_scored

    def _top(self, expected: Mapping[Row, float]) -> list[Row]:
        return sorted(expected, key=lambda row: -expected[row])[:TOP_K]

    def _regret(self, top: Sequence[Row]) -> float:
        winner = max(top, key=lambda row: self._on_hold_out[row.index])
        best = max(self._truth[row.index] for row in self._candidates)
        return 100 * float(best - self._truth[winner.index])


def main() -> None:
    """Print one table per recording."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recordings", nargs="*", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--round-blocks", type=int, default=0, help="default: one a task")
    parser.add_argument("--select", type=int, default=0, help="per task; default: 75 %%")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    args = parser.parse_args()
    for path in args.recordings or sorted(HERE.glob("*.npz")):
        recording = Recording.load(path)
        n_examples = min(table.shape[1] for table in recording.scores.values())
        n_select = args.select or int(0.75 * n_examples) // BLOCK_SIZE * BLOCK_SIZE
        round_blocks = args.round_blocks or len(recording.goals)
        print(
            f"{path.name}: {len(recording.rows) - recording.n_references} candidates, "
            f"{len(recording.goals)} tasks of {n_examples} examples, {n_select} of them select; "
            f"rounds of {round_blocks} blocks; {args.runs} runs"
        )
        runs = [
            Run(recording, args.first_seed + i, n_select, round_blocks) for i in range(args.runs)
        ]
        full, _, regret_off = (np.array(x) for x in zip(*(r.without() for r in runs), strict=True))
        print(f"{'rule':36s} {'fewer examples':>14s} {'best stopped':>13s} {'regret':>7s}   more")
        print(f"{'no racing':36s} {1:12.2f} x {0:11.1f} % {regret_off.mean():7.2f}")
        for name in args.rules:
            results = [run.under(*RULES[name]) for run in runs]
            scored, lost, regret = (np.array(column) for column in zip(*results, strict=True))
            more = regret - regret_off
            error = more.std(ddof=1) / np.sqrt(len(more))
            print(
                f"{name:36s} {np.mean(full / scored):12.2f} x {100 * lost.mean():11.1f} % "
                f"{regret.mean():7.2f}  {more.mean():+.2f} +- {error:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
