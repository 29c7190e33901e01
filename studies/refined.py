"""Refine a published plan from few and from many examples, and judge it on others.

python studies/refined.py STUDY [--sizes 80 160 320 640] [--seeds 5] [--start TSV-M]
    [--set KEY=VALUE ...]

For every seed each task's examples are shuffled: the first select, those after the largest size
are held out. Printed are what the start and what is proposed score there, as the mean over tasks
of score / own expert's score in per cent; where nothing is proposed the start is what is kept.
"""

import argparse
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from searchmerge import assemble
from searchmerge.config import RunConfig
from searchmerge.execution.blocks import Block
from searchmerge.execution.worker import Worker
from searchmerge.models import open_models
from searchmerge.plan import MergePlan
from searchmerge.search.references import expert_name, reference_plans
from searchmerge.search.refine import Material, Refined, Refinement, refinement
from searchmerge.search.refinements import Refining
from searchmerge.study import read_study

Examples = Mapping[str, Sequence[int]]


def scores(worker: Worker, plan: MergePlan, examples: Examples) -> dict[str, float]:
    """Return each task's mean score of a plan."""
    blocks = [(Block(task, "select", 0, tuple(its)),) for task, its in examples.items()]
    results = [each for result in worker.score(plan, blocks) for each in result.scores]
    return {each.block.task: float(np.mean(each.values)) for each in results}


def refined(worker: Worker, asks: Refinement) -> Refined | None:
    """Run a refinement to its end."""
    try:
        plan, request = next(asks)
        while True:
            [result] = worker.gradient(plan, request)
            plan, request = asks.send(result)
    except StopIteration as end:
        proposed: Refined | None = end.value
        return proposed


class Judge:
    """Tells how good plans are on held-out examples.

    Args:
        worker: Scores them.
        experts: Task to its own expert's plan.
        held_out: Task to its examples.
    """

    def __init__(
        self, worker: Worker, experts: Mapping[str, MergePlan], held_out: Examples
    ) -> None:
        self._worker, self._held_out = worker, held_out
        self._own = {t: scores(worker, experts[t], {t: held_out[t]})[t] for t in held_out}

    def __call__(self, plan: MergePlan) -> float:
        """Return the mean over tasks of score / own expert's score, in per cent."""
        its = scores(self._worker, plan, self._held_out)
        return 100 * float(np.mean([score / self._own[task] for task, score in its.items()]))


def main() -> None:
    """Print one line for every seed and size, and the means over seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=[80, 160, 320, 640])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--start", default="TSV-M")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], dest="overrides")
    args = parser.parse_args()
    study = read_study(args.study, dict(setting.split("=", 1) for setting in args.overrides))
    models = open_models(study)
    worker = assemble.make_worker(study, models, RunConfig(device="cpu", threads=args.threads))
    refining = assemble.make_refining(study, models)
    if refining is None:
        raise SystemExit(f"{args.study}: search.refine is off; give --set search.refine=...")
    plans = reference_plans(study.experts)
    experts = {task: plans[expert_name(str(t.expert))] for task, t in study.spec.tasks.items()}
    gains: dict[int, list[float]] = {size: [] for size in args.sizes}
    for seed in range(args.seeds):
        with_seed = replace(refining, recipe=replace(refining.recipe, seed=seed))
        for size, gain in gains_of(worker, with_seed, plans[args.start], experts, args.sizes):
            gains[size].append(gain)
    for size, its in gains.items():
        error = np.std(its, ddof=1) / np.sqrt(len(its)) if len(its) > 1 else float("nan")
        print(f"{size:4d} examples: {np.mean(its):+.2f} +- {error:.2f}, least {min(its):+.2f}")


def gains_of(
    worker: Worker,
    refining: Refining,
    plan: MergePlan,
    experts: Mapping[str, MergePlan],
    sizes: Sequence[int],
) -> Iterator[tuple[int, float]]:
    """Yield for every size by how many points what is proposed is ahead of the plan."""
    start, seed = refining.start(plan), refining.recipe.seed
    order = {
        task: random.Random(f"{seed}/{task}").sample(range(info.n_examples), info.n_examples)
        for task, info in worker.tasks().items()
    }
    judge = Judge(worker, experts, {task: its[max(sizes) :] for task, its in order.items()})
    before = judge(start)
    for size in sizes:
        begun = time.monotonic()
        some = {task: its[:size] for task, its in order.items()}
        material = Material(some, dict.fromkeys(order, 1.0))
        proposed = refined(worker, refinement(start, refining.recipe, material))
        seconds = time.monotonic() - begun
        after = judge(proposed.plan) if proposed else before
        what = _told(proposed) if proposed else "nothing proposed"
        print(
            f"seed {seed}, {size:4d} examples: {before:.1f} -> {after:.1f} "
            f"({what}, {seconds:.0f} s)",
            flush=True,
        )
        yield size, after - before


def _told(proposed: Refined) -> str:
    """Return how far a refinement went, and what the examples that decided that say of it."""
    gain = f"{proposed.gain:.4f} +- {proposed.standard_error:.4f}"
    return f"{proposed.n_steps} steps, {proposed.shrink:g} of the way, loss down by {gain}"


if __name__ == "__main__":
    main()
