"""Replay recorded scores under racing rules: what each saves, and what it costs.

python replay.py [quickstart.npz encoder.npz] [--runs 200]

A run draws which examples select and which are held out, the order of the blocks and the order
of the candidates. Every rule then sees the same run. Printed per rule: how many times fewer
examples were scored than without racing; how often the best candidate of the full select scores
was stopped (and none as good was left); and the regret of the confirmed winner, which is the best
candidate's objective on all examples minus that of the winner, in points. The winner is the best
on held-out examples of the top 3 that were scored in full.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import wilcoxon

from searchmerge.evaluators.blocks import Block, make_blocks, make_rounds
from searchmerge.evaluators.evaluator import Part, TaskInfo
from searchmerge.search.objective import Goal, Objective
from searchmerge.search.racing import Known, Racing, Rival
from searchmerge.search.references import BASE, expert_name

HERE = Path(__file__).resolve().parent
BLOCK_SIZE = 8
TOP_K = 3

Table = npt.NDArray[np.float64]
Rule = Callable[[Objective, Mapping[str, Sequence[Block]], Known, Rival, Rival], bool]


def predicted(p_threshold: float) -> Rule:
    """Return the product's rule."""
    racing = Racing(p_threshold=p_threshold)
    return lambda goal, blocks, known, best, base: racing.stops(goal, blocks, known, [best], base)


def signed_rank(p_threshold: float) -> Rule:
    """Return a signed-rank test of the block means, in units of the objective."""

    def stops(
        goal: Objective,
        blocks: Mapping[str, Sequence[Block]],
        known: Known,
        best: Rival,
        base: Rival,
    ) -> bool:
        differences = np.array(
            [
                goal.unit(key[0]) * (np.mean(own) - np.mean(best.known[key]))
                for key, own in known.items()
            ]
        )
        if len(differences) < BLOCK_SIZE or differences.mean() >= 0:
            return False
        test = wilcoxon(differences, alternative="less", zero_method="zsplit")
        return bool(test.pvalue < p_threshold)

    return stops


RULES: dict[str, Rule | None] = {
    "off": None,
    "signed rank, p 0.05": signed_rank(0.05),
    "signed rank, p 0.1": signed_rank(0.1),
    **{f"predicted, p {p}": predicted(p) for p in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)},
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


class Run:
    """One drawing of examples, blocks and candidates, that every rule sees alike.

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
        self._scores = recording.scores
        self._select = {task: order[:n_select] for task, order in orders.items()}
        self._candidates = generator.permutation(
            np.arange(recording.n_references, len(recording.rows))
        )
        info = TaskInfo(n_select, mean=True)
        self._blocks = {
            task: make_blocks(task, "select", range(n_select), info, BLOCK_SIZE)
            for task in recording.goals
        }
        self._rounds = make_rounds(self._blocks, round_blocks=round_blocks, seed=seed)
        self._on_select = recording.values(self._select)
        self._on_hold_out = recording.values(hold_out)
        self._truth = recording.values(orders)
        self._goal = recording.objective(self._select)
        self._base = self._rival(recording.rows.index(BASE))

    def under(self, rule: Rule | None) -> tuple[float, bool, float]:
        """Return how many examples a rule scores, if it loses the best, and the regret."""
        n_scored, full, best = 0, [], -1
        best_rival = self._base
        for row in self._candidates:
            n_examples, finished = self._race(int(row), rule if full else None, best_rival)
            n_scored += n_examples
            if finished:
                full.append(row)
            if finished and (best < 0 or self._on_select[row] > self._on_select[best]):
                best, best_rival = row, self._rival(int(row))
        top = sorted(full, key=lambda row: -self._on_select[row])[:TOP_K]
        winner = max(top, key=lambda row: self._on_hold_out[row])
        lost = max(self._on_select[self._candidates]) > max(self._on_select[full]) + 1e-12
        regret = 100 * float(self._truth[self._candidates].max() - self._truth[winner])
        return n_scored, bool(lost), regret

    def _race(self, row: int, rule: Rule | None, best: Rival) -> tuple[int, bool]:
        known: dict[tuple[str, Part, int], tuple[float, ...]] = {}
        n_scored = 0
        for i, own in enumerate(self._rounds, start=1):
            known |= self._known(row, own)
            n_scored += sum(len(block.examples) for block in own)
            is_last = i == len(self._rounds)
            if rule and not is_last and rule(self._goal, self._blocks, known, best, self._base):
                return n_scored, False
        return n_scored, True

    def _known(
        self, row: int, blocks: Sequence[Block]
    ) -> dict[tuple[str, Part, int], tuple[float, ...]]:
        return {
            b.key: tuple(self._scores[b.task][row][self._select[b.task][list(b.examples)]])
            for b in blocks
        }

    def _rival(self, row: int) -> Rival:
        scores = {t: float(self._scores[t][row][self._select[t]].mean()) for t in self._blocks}
        every_block = [block for own in self._rounds for block in own]
        return Rival(scores, self._known(row, every_block))


def main() -> None:
    """Print one table per recording."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recordings", nargs="*", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--round-blocks", type=int, default=0, help="default: one a task")
    parser.add_argument("--select", type=int, default=0, help="per task; default: 60 %%")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    args = parser.parse_args()
    for path in args.recordings or sorted(HERE.glob("*.npz")):
        recording = Recording.load(path)
        n_examples = min(table.shape[1] for table in recording.scores.values())
        n_select = args.select or int(0.6 * n_examples) // BLOCK_SIZE * BLOCK_SIZE
        round_blocks = args.round_blocks or len(recording.goals)
        print(
            f"{path.name}: {len(recording.rows) - recording.n_references} candidates, "
            f"{len(recording.goals)} tasks of {n_examples} examples, {n_select} of them select; "
            f"rounds of {round_blocks} blocks; {args.runs} runs"
        )
        runs = [
            Run(recording, args.first_seed + i, n_select, round_blocks) for i in range(args.runs)
        ]
        without = np.array([run.under(None)[0] for run in runs])
        print(
            f"{'rule':22s} {'fewer examples':>15s} {'best stopped':>13s} {'regret, points':>22s}"
        )
        for name in args.rules:
            results = [run.under(RULES[name]) for run in runs]
            scored, lost, regret = (np.array(column) for column in zip(*results, strict=True))
            error = regret.std(ddof=1) / np.sqrt(len(regret))
            print(
                f"{name:22s} {np.mean(without / scored):13.2f} x {100 * lost.mean():11.1f} % "
                f"{regret.mean():12.2f} +- {error:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
