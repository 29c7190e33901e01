"""Replay recorded plans under rules of racing and of picking: what each saves, and what it costs.

python replay.py [quickstart.npz encoder.npz] [--runs 200] [--trials 48] [--select 72]

A run draws which examples select and which are held out, which of the plans are the trials of a
search, and in which order they come. Every rule then sees the same run. Printed per rule: how many
times fewer examples were scored than without racing; how often the best candidate by its full
score was stopped (and none as good was left); and the regret of the plan that is saved, in points:
by how much the best plan of all is ahead of it on the further examples that are neither selected
on nor held out, which no rule sees. Beside it how much that is less than the first rule's, with
its standard error.

Much of a regret is luck: of many plans the one that does best on some examples does so by chance
too. "Luck aside" is by how much the plan that is best on one half of the further examples is ahead
on the other half of the plan that is saved: below 0 where the rule picks better than one who saw
that half. It is the mean of both ways round.

Then, on the same further examples, how the plan that is saved stands to two references: to the one
that does best there, which nobody can know, and to the one that has the best evidence of them, as
the verdict of a study picks it. Of each the mean by which the saved plan is ahead, in points, and
how often it is distinguishably below: a 95 % interval of the difference, paired by example, has
both ends below 0. Runs share the plans and most of the further examples, so that the standard
errors over runs say nothing of another study.
"""

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import wilcoxon

from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.blocks import (
    Block,
    BlockKey,
    BlockValues,
    Part,
    Round,
    make_blocks,
    telling_first,
)
from searchmerge.search.incumbents import Incumbents
from searchmerge.search.objective import Goal, Objective
from searchmerge.search.pick import confirmed, evidence_on_select
from searchmerge.search.racing import Incumbent, Observed, Racing
from searchmerge.search.references import expert_name, is_merge
from searchmerge.search.schedule import Places, Schedule
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.trials import TrialRecord

HERE = Path(__file__).resolve().parent
BLOCK_SIZE = 8
TOP_K = 3
N_ERRORS = 1.96  # standard errors on either side are a 95 % interval

Table = npt.NDArray[np.float64]
Examples = Mapping[str, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class SignedRank:
    """A signed-rank test of the block means, in units of the objective; in the place of Racing."""

    p_threshold: float

    def stops(
        self,
        objective: Objective,
        places: Places,
        observed: Observed,
        incumbents: Sequence[Incumbent],
        base: object,
    ) -> bool:
        """Return whether the blocks seen are worse with confidence."""
        if not incumbents or len(observed.values) < BLOCK_SIZE:
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
                for key, values in observed.values.items()
            ]
        )
        if differences.mean() >= 0:
            return False
        test = wilcoxon(differences, alternative="less", zero_method="zsplit", method="asymptotic")
        return bool(test.pvalue < self.p_threshold)


RACING = Racing()


@dataclass(frozen=True)
class Rule:
    """How a search races, and how it picks what is saved.

    Attributes:
        racing: Stops candidates; ``None`` scores all in full.
        order: How the examples are cut into blocks.
        graded: Whether it goes by how clearly examples were answered too.
        all_compete: Whether published plans compete: candidates race against them too, go on in
            the end where they may win, and the plan with the best evidence is saved, found or
            published; else the best on held-out examples of the top candidates.
    """

    racing: Racing | SignedRank | None = RACING
    order: str = "informed"
    graded: bool = False
    all_compete: bool = False


RULES = {
    "before": Rule(),
    "no racing": Rule(None),
    "graded": Rule(graded=True),
    "all compete": Rule(all_compete=True),
    "graded, all compete": Rule(graded=True, all_compete=True),
    "the same, no racing": Rule(None, graded=True, all_compete=True),
    "signed rank, p 0.05": Rule(SignedRank(0.05), "random"),
    **{
        f"graded, all compete, p {p}": Rule(Racing(p), graded=True, all_compete=True)
        for p in (0.01, 0.02, 0.05, 0.1)
    },
}
DEFAULT = (
    "before",
    "no racing",
    "graded",
    "all compete",
    "graded, all compete",
    "the same, no racing",
)


@dataclass(frozen=True)
class Recording:
    """What plans of a study scored: one row per plan, references first.

    Attributes:
        rows: What the plans are called.
        n_references: How many are references.
        goals: Task to what it counts for.
        values: Task to ``(n_plans, n_examples)``.
        grades: The same, how clearly examples were answered; NaN where that is not known.
    """

    rows: list[str]
    n_references: int
    goals: dict[str, Goal]
    values: dict[str, Table]
    grades: dict[str, Table]

    @classmethod
    def load(cls, path: Path) -> "Recording":
        """Read what record.py wrote."""
        with np.load(path) as data:
            meta = json.loads(str(data["meta"]))
            goals = {task: Goal(*goal) for task, goal in meta["goals"].items()}
            values = {task: data[f"{task}/values"].astype(float) for task in goals}
            grades = {task: data[f"{task}/grades"].astype(float) for task in goals}
        return cls(meta["rows"], meta["n_references"], goals, values, grades)

    def objective(self, examples: Examples) -> Objective:
        """Return the normalised objective on some examples."""
        own = {
            task: float(self.values[task][self._expert(task)][its].mean())
            for task, its in examples.items()
        }
        return Objective("normalised", self.goals, own)

    def _expert(self, task: str) -> int:
        return self.rows.index(expert_name(str(self.goals[task].expert)))

    def truth(self, examples: Examples) -> Table:
        """Return every plan's objective on some examples, by the metric."""
        goal = self.objective(examples)
        means = {task: self.values[task][:, its].mean(1) for task, its in examples.items()}
        return np.array(
            [
                goal.scalar({task: float(its[row]) for task, its in means.items()})
                for row in range(len(self.rows))
            ]
        )

    def lead(self, row: int, other: int, examples: Examples) -> "Lead":
        r"""Return how far a plan is ahead of another on some examples, by the metric.

        Examples are another draw for both plans and for the experts alike: of a task whose
        expert has the mean :math:`\bar e`, an example's part in the difference :math:`\bar d` is
        :math:`d_i - \bar d - \frac{\bar d}{\bar e} (e_i - \bar e)`.
        """
        goal = self.objective(examples)
        points, variance = 0.0, 0.0
        for task, its in examples.items():
            values = self.values[task][:, its]
            differences, expert = values[row] - values[other], values[self._expert(task)]
            mean = differences.mean()
            parts = differences - mean - mean / expert.mean() * (expert - expert.mean())
            points += goal.unit(task) * mean
            variance += goal.unit(task) ** 2 * parts.var(ddof=1) / len(its)
        return Lead(100 * points, 100 * math.sqrt(variance))


class Lead(NamedTuple):
    """By how much a plan is ahead of another, and the standard error of that, in points."""

    points: float
    error: float

    @property
    def is_below(self) -> bool:
        """Whether the plan is distinguishably below the other."""
        return self.points + N_ERRORS * self.error < 0


class Outcome(NamedTuple):
    """What a rule came to in a run.

    Attributes:
        n_scored: How many examples were scored.
        lost: Whether the best candidate was stopped and none as good was left.
        regret: By how many points the best plan of all is ahead of what is saved.
        aside: The same of the best plan on other further examples.
        best: How far what is saved is ahead of the reference that does best.
        picked: The same, of the reference with the best evidence.
    """

    n_scored: int
    lost: bool
    regret: float
    aside: float
    best: Lead
    picked: Lead


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

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._values: dict[Row, dict[BlockKey, tuple[float, ...]]] = {}
        self._grades: dict[Row, dict[BlockKey, tuple[float, ...]]] = {}

    def show(self, row: Row, blocks: Sequence[Block]) -> int:
        """Put down what a row scored on blocks; return how many examples that were."""
        values, grades = self._values.setdefault(row, {}), self._grades.setdefault(row, {})
        for block in blocks:
            its = list(block.examples)
            values[block.key] = tuple(self._recording.values[block.task][row.index][its])
            graded = self._recording.grades[block.task][row.index][its]
            grades[block.key] = () if np.isnan(graded).any() else tuple(graded)
        return sum(len(block.examples) for block in blocks)

    def get(self, row: Row) -> BlockValues:
        """Return what was shown of a row."""
        return self._values.get(row, {})

    def grades(self, row: Row) -> BlockValues:
        """Return how clearly a row answered what was shown of it."""
        return self._grades.get(row, {})

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
        n_select: Examples of each task that candidates are scored on.
        n_hold_out: Examples of each task that the best are confirmed on.
        n_trials: Candidates.
    """

    def __init__(
        self, recording: Recording, seed: int, n_select: int, n_hold_out: int, n_trials: int
    ) -> None:
        generator = np.random.default_rng(seed)
        self._seed = seed
        self._recording = recording
        select, hold_out, further = {}, {}, {}
        for task, values in recording.values.items():
            order = generator.permutation(values.shape[1])
            select[task], others = order[:n_select], order[n_select:]
            hold_out[task], further[task] = others[:n_hold_out], others[n_hold_out:]
        numbers = np.arange(recording.n_references, len(recording.rows))
        self._candidates = [Row(int(i)) for i in generator.permutation(numbers)[:n_trials]]
        self._references = [Row(i) for i in range(recording.n_references)]
        self._further = further
        self._truth = recording.truth(further)
        halves = [{task: its[i::2] for task, its in further.items()} for i in range(2)]
        self._halves = [recording.truth(half) for half in halves]  # their order is drawn
        self._goal = recording.objective(select)
        self._schedules = self._cut(select, hold_out)

    def _cut(self, select: Examples, hold_out: Examples) -> dict[str, Schedule]:
        """Cut the examples into blocks, at random and by how telling they are."""
        infos = {
            task: TaskInfo(values.shape[1]) for task, values in self._recording.values.items()
        }
        blocks: dict[Part, dict[str, tuple[Block, ...]]] = {"select": {}, "hold_out": {}}
        for part, examples in zip(blocks, (select, hold_out), strict=True):
            for task, its in examples.items():
                numbers = [int(example) for example in its]
                blocks[part][task] = make_blocks(task, part, numbers, infos[task], BLOCK_SIZE)
        informed = {
            task: telling_first(
                its,
                [
                    dict(enumerate(self._recording.values[task][row.index]))
                    for row in self._references[1:]
                ],
                "select",
            )
            for task, its in blocks["select"].items()
        }
        cuts = {"random": blocks, "informed": {**blocks, "select": informed}}
        return {
            name: Schedule.interleaved(infos, cut, round_blocks=len(infos), seed=None)
            for name, cut in cuts.items()
        }

    def under(self, rule: Rule) -> Outcome:
        """Return what a rule comes to."""
        scores = Scores(self._recording)
        board = Scoreboard(self._schedules[rule.order], scores)
        every_block = [b for rounds in board.schedule.rounds.values() for r in rounds for b in r]
        for row in self._references:
            scores.show(row, every_block)
        competing = self._references if rule.all_compete else self._alone()
        incumbents = Incumbents(
            board,
            self._goal,
            rule.racing,
            references={self._recording.rows[row.index]: row for row in competing},
            seed=self._seed if rule.graded else None,
        )
        n_scored, told = 0, {}
        for row in self._candidates:
            n_scored += self._race(row, incumbents, scores)
            told[row] = self._told(row, incumbents)
            incumbents.enter(told[row])
        if rule.all_compete:
            n_scored += self._settle(told, incumbents, scores)
        lost = self._lost(board, told.values(), incumbents, rule)
        for record in sorted(told.values(), key=lambda record: -record.value)[:TOP_K]:
            for blocks in board.missing(record.plan, "select"):
                n_scored += scores.show(record.plan, blocks)
        full = [row for row in self._candidates if board.is_full(row, "select")]
        for row in full:
            scores.show(row, [b for r in board.schedule.rounds["hold_out"] for b in r])
        stopped = [record for record in incumbents.stopped if record.plan not in full]
        saved, picked = self._pick(board, full, stopped, rule)
        best = max(self._references, key=lambda row: float(self._truth[row.index]))
        leads = (self._lead(saved, best), self._lead(saved, picked))
        return Outcome(n_scored, lost, self._regret(saved), self._aside(saved), *leads)

    def _regret(self, saved: Row) -> float:
        """Return by how many points the best plan of all is ahead of one."""
        best = max(self._truth[row.index] for row in [*self._references, *self._candidates])
        return 100 * float(best - self._truth[saved.index])

    def _aside(self, saved: Row) -> float:
        """Return how far the best on one half is ahead on the other, in points."""
        rows = [row.index for row in [*self._references, *self._candidates]]
        ahead = [
            theirs[max(rows, key=chosen.__getitem__)] - theirs[saved.index]
            for chosen, theirs in (self._halves, self._halves[::-1])
        ]
        return 100 * float(np.mean(ahead))

    def _lead(self, saved: Row, reference: Row) -> Lead:
        return self._recording.lead(saved.index, reference.index, self._further)

    def _merges(self) -> list[Row]:
        """Return the references but the base and the experts."""
        return [row for row in self._references if row not in self._alone()]

    def _alone(self) -> list[Row]:
        """Return the base and the experts."""
        return [row for row in self._references if not is_merge(self._recording.rows[row.index])]

    def _race(self, row: Row, incumbents: Incumbents, scores: Scores) -> int:
        n_scored = 0
        for blocks in incumbents.rounds():
            if blocks[0].key not in scores.get(row):
                if scores.get(row) and not incumbents.may_win(row):
                    break
                n_scored += scores.show(row, blocks)
        return n_scored

    def _told(self, row: Row, incumbents: Incumbents) -> TrialRecord:
        """Return the record of a candidate that is done with."""
        outcome = incumbents.outcome(row)
        record = TrialRecord(row.index, row, se=outcome.se, stopped_after=outcome.stopped_after)
        return record.judged(self._goal, outcome.scores, outcome.estimates)

    def _settle(self, told: dict[Row, TrialRecord], incumbents: Incumbents, scores: Scores) -> int:
        """Go on with what may win in the end; return how many examples that took."""
        n_scored = 0
        while True:
            incumbents.read_anew()
            stopped = incumbents.predict_anew()
            told.update((record.plan, record) for record in stopped)
            may_win = [record.plan for record in stopped if incumbents.may_win(record.plan)]
            if not may_win:
                return n_scored
            for row in may_win:
                n_scored += self._race(row, incumbents, scores)
                told[row] = self._told(row, incumbents)
                incumbents.enter(told[row])

    def _read(
        self,
        board: Scoreboard,
        full: Iterable[Row],
        stopped: Iterable[TrialRecord],
        rule: Rule,
    ) -> Scoreboard:
        """Return the scoreboard with grades read as all that was scored tells."""
        if not rule.graded:
            return board
        plans = [*self._merges(), *full, *(record.plan for record in stopped)]
        return board.read_by(board.learn(plans, self._seed))

    def _lost(
        self, board: Scoreboard, told: Iterable[TrialRecord], incumbents: Incumbents, rule: Rule
    ) -> bool:
        """Return whether the best by its full score was stopped, and none as good was left."""
        left = [
            *(r.plan for r in told if r.is_full),
            *(self._merges() if rule.all_compete else ()),
        ]
        grader = self._read(board, left, incumbents.stopped, rule).grader
        value = {}
        for row in {*self._candidates, *left}:
            means = {}
            for task, blocks in board.schedule.blocks["select"].items():
                its = [example for block in blocks for example in block.examples]
                values = self._recording.values[task][row.index][its]
                grades = self._recording.grades[task][row.index][its]
                means[task] = float(grader.reading(task)(values, grades).mean())
            value[row] = self._goal.scalar(means)
        return max(value.values()) > max((value[row] for row in left), default=-np.inf) + 1e-12

    def _pick(
        self, board: Scoreboard, full: Sequence[Row], stopped: Sequence[TrialRecord], rule: Rule
    ) -> tuple[Row, Row]:
        """Return the plan that is saved, and the reference with the best evidence."""
        board = self._read(board, full, stopped, rule)
        names = {self._recording.rows[row.index]: row for row in [*self._references, *full]}
        found = {self._recording.rows[row.index] for row in full}
        evidence = evidence_on_select(board, names, self._goal, stopped)
        top_names = [name for name in evidence.ranked() if name in found][:TOP_K]
        contest = {n: row for n, row in names.items() if n not in found or n in top_names}
        ranked = confirmed(board, evidence, contest, self._goal).ranked()
        reference = next(names[name] for name in ranked if name not in found)
        return names[ranked[0]] if rule.all_compete else self._of_top(board, full), reference

    def _of_top(self, board: Scoreboard, full: Sequence[Row]) -> Row:
        """Return the best on held-out examples of the top candidates."""
        value = {row: self._goal.scalar(board.estimates(row, "select")) for row in full}
        top = sorted(full, key=lambda row: -value[row])[:TOP_K]
        on_hold_out = {row: self._goal.scalar(board.scores(row, "hold_out")) for row in top}
        return max(top, key=lambda row: on_hold_out[row])


def main() -> None:
    """Print one table per recording."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recordings", nargs="*", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--select", type=int, default=72, help="examples of each task")
    parser.add_argument("--hold-out", type=int, default=128, help="examples of each task")
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--rules", nargs="+", default=list(DEFAULT), choices=list(RULES))
    args = parser.parse_args()
    for path in args.recordings or sorted(HERE.glob("*.npz")):
        recording = Recording.load(path)
        n_further = min(v.shape[1] for v in recording.values.values())
        n_further -= args.select + args.hold_out
        print(
            f"{path.name}: {len(recording.rows)} plans, {len(recording.goals)} tasks; of each "
            f"{args.select} examples select, {args.hold_out} are held out, "
            f"{n_further} decide the regret; {args.trials} trials, "
            f"{args.runs} runs"
        )
        print(
            f"{'rule':30s} {'fewer examples':>14s} {'best stopped':>13s} {'regret':>14s}   "
            f"{'less':14s} {'luck aside':>14s} {'ahead of best ref.':>19s} {'below':>8s} "
            f"{'of picked ref.':>19s} {'below':>8s}"
        )
        first = None
        runs = [
            Run(recording, args.first_seed + i, args.select, args.hold_out, args.trials)
            for i in range(args.runs)
        ]
        n_full = len(recording.goals) * args.select * args.trials
        for name in args.rules:
            results = [run.under(RULES[name]) for run in runs]
            first = [run.regret for run in results] if first is None else first
            print(f"{name:30s} {_line(results, first, n_full)}", flush=True)


def _line(results: Sequence[Outcome], first: Sequence[float], n_full: int) -> str:
    """Return what a rule comes to over runs, beside the regret of the first rule in each."""
    fewer = np.mean([n_full / run.n_scored for run in results])
    lost = np.mean([run.lost for run in results])
    regret = np.array([run.regret for run in results])
    line = f"{fewer:12.2f} x {100 * lost:11.1f} % {_mean(regret, '7.2f')}  "
    line += _mean(np.array(first) - regret, "+.2f") + "  "
    line += _mean(np.array([run.aside for run in results]), "+6.2f")
    for leads in ([run.best for run in results], [run.picked for run in results]):
        below = np.mean([lead.is_below for lead in leads])
        line += f"  {_mean(np.array([lead.points for lead in leads]), '+10.2f')} "
        line += f"{100 * below:6.1f} %"
    return line


def _mean(values: Table, form: str) -> str:
    """Return the mean over runs with its standard error."""
    return f"{values.mean():{form}} +- {values.std(ddof=1) / np.sqrt(len(values)):.2f}"


if __name__ == "__main__":
    main()
