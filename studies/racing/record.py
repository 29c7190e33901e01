"""Score diverse plans of a study on every example, right or wrong and how clearly, for replay.py.

python record.py STUDY OUT.npz --examples 700 [--plans 170] [--set KEY=VALUE ...]

The plans are the references, and as many drawn with a seed from all over what methods allow:
several methods, scales around the published ones, one number for all experts or one each. What was
scored is kept after every fourth plan; an interrupted recording goes on.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from searchmerge import assemble
from searchmerge.config import RunConfig
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.blocks import Block
from searchmerge.execution.worker import Worker
from searchmerge.merging.method import METHODS, default_plan
from searchmerge.models import open_models
from searchmerge.plan import MergePlan
from searchmerge.search.references import reference_plans
from searchmerge.study import Study, read_study

DRAWN = ("ties", "pcb", "tsv", "task_arithmetic", "ties", "tsv", "dare", "pcb", "iso_c", "ties")
"""Methods of the plans, in turns: those with more to choose more often."""


def drawn_plans(experts: Sequence[str], seed: int) -> Iterator[MergePlan]:
    """Yield plans without end: a scale around the published one, shares, densities."""
    draw = random.Random(seed)
    for i in range(10**6):
        method = DRAWN[i % len(DRAWN)]
        numbers: dict[str, Any] = {}
        for legal in METHODS[method].hyperparameters:
            low, high = legal.search
            if legal.name == "coefficient":
                scale = legal.default * float(np.exp(draw.gauss(0.0, 0.3)))
                spread = draw.choice((0.0, 0.0, 0.2, 0.4))
                row = [scale * float(np.exp(draw.gauss(0.0, spread))) for _ in experts]
                numbers["coefficient"] = [min(legal.high, value) for value in row]
            elif legal.name == "density":
                each = draw.random() < 0.3
                shared = draw.uniform(low, high)
                row = [draw.uniform(low, high) if each else shared for _ in experts]
                numbers["density"] = [round(value, 2) for value in row]
        yield default_plan(method, experts, **numbers)


Rows = dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]
"""Task to what each example scored, and how clearly it was answered; NaN where that is unknown."""


def task_block(task: str, info: TaskInfo, n_examples: int, seed: int) -> Block:
    """Return a task's first examples, shuffled as a study does, as one block."""
    order = list(range(info.n_examples))
    random.Random(f"{seed}/{task}").shuffle(order)
    if len(order) < n_examples:
        raise SystemExit(f"{task}: {len(order)} examples; {n_examples} are wanted")
    return Block(task, "select", 0, tuple(order[:n_examples]))


def rows_of(worker: Worker, plan: MergePlan, blocks: Sequence[Block]) -> Rows:
    """Merge a plan and score it on one block of each task."""
    [result] = worker.score(plan, [tuple(blocks)])
    return {
        scores.block.task: (
            np.array(scores.values, np.float32),
            np.array(scores.grades or [np.nan] * len(scores.values), np.float32),
        )
        for scores in result.scores
    }


def main() -> None:
    """Score plan after plan, and keep what was scored."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--examples", type=int, required=True, help="of each task")
    parser.add_argument("--plans", type=int, default=170)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after as many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], dest="overrides")
    args = parser.parse_args()
    study = read_study(args.study, dict(setting.split("=", 1) for setting in args.overrides))
    config = RunConfig(device=args.device, threads=args.threads)
    record(args, study, assemble.make_worker(study, open_models(study), config))


def record(args: argparse.Namespace, study: Study, worker: Worker) -> None:
    """Score what is not scored yet."""
    begun = time.monotonic()
    spec = study.spec
    plans = reference_plans(study.experts)
    meta = {
        "study": study.name,
        "n_references": len(plans),
        "goals": {task: [goal.weight, goal.expert] for task, goal in spec.tasks.items()},
    }
    drawn = drawn_plans(study.experts, args.seed)
    plans |= {f"drawn {i}": next(drawn) for i in range(args.plans)}
    blocks = [task_block(t, i, args.examples, spec.search.seed) for t, i in worker.tasks().items()]
    kept = _load(args.out, args.examples)
    for name, plan in plans.items():
        if name in kept:
            continue
        if time.monotonic() - begun > args.seconds:
            break
        kept[name] = (plan, rows_of(worker, plan, blocks))
        means = " ".join(f"{values.mean():.3f}" for values, _ in kept[name][1].values())
        seconds = time.monotonic() - begun
        print(f"{seconds:6.0f} s  {name:16s} {plan.method:16s} {means}", flush=True)
        if len(kept) % 4 == 0:
            _save(args.out, meta, _ordered(kept, plans))
    _save(args.out, meta, _ordered(kept, plans))


def _ordered(kept: dict[str, Any], plans: dict[str, MergePlan]) -> dict[str, Any]:
    """Return what is kept, references first."""
    return {name: kept[name] for name in plans if name in kept}


def _save(out: Path, meta: dict[str, Any], kept: dict[str, Any]) -> None:
    told = {**meta, "rows": list(kept), "plans": [plan.to_dict() for plan, _ in kept.values()]}
    arrays: dict[str, Any] = {}
    for task in meta["goals"]:
        arrays[f"{task}/values"] = np.array([rows[task][0] for _, rows in kept.values()], np.uint8)
        grades = np.array([rows[task][1] for _, rows in kept.values()], np.float16)
        arrays[f"{task}/grades"] = grades
    temporary = out.with_suffix(".part.npz")
    np.savez_compressed(temporary, meta=np.array(json.dumps(told)), **arrays)
    temporary.replace(out)


def _load(out: Path, n_examples: int) -> dict[str, Any]:
    if not out.exists():
        return {}
    with np.load(out) as data:
        meta = json.loads(str(data["meta"]))
        tasks = list(meta["goals"])
        if (n_kept := data[f"{tasks[0]}/values"].shape[1]) != n_examples:
            raise SystemExit(f"{out}: holds {n_kept} examples of each task, not {n_examples}")
        tables = {t: (data[f"{t}/values"], data[f"{t}/grades"]) for t in tasks}
    return {
        name: (
            MergePlan.from_dict(plan),
            {t: (tables[t][0][i].astype(np.float32), tables[t][1][i]) for t in tasks},
        )
        for i, (name, plan) in enumerate(zip(meta["rows"], meta["plans"], strict=True))
    }


if __name__ == "__main__":
    main()
