"""Write down what every candidate of a finished study scored on every example, for replay.py.

python record.py RUN_DIR OUT.npz   where RUN_DIR is a study that was run with racing off and with
a top_k no smaller than its trials, so that every candidate was scored on both parts.
"""

import argparse
import json
import sqlite3
from pathlib import Path

import numpy as np

from searchmerge.search.directory import records_of, stored_study
from searchmerge.search.references import reference_plans

PARTS = ("select", "hold_out")


def main() -> None:
    """Read the score cache and write one table per task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    with stored_study(args.run_dir) as study:
        plans = {record.name: record.plan for record in records_of(study) if record.is_full}
        spec = json.loads(study.user_attrs["spec"])
    experts = next(iter(plans.values())).experts
    references = reference_plans(experts)
    known = {plan.digest for plan in references.values()}
    candidates = {}
    for name, plan in plans.items():
        if plan.digest not in known:
            known.add(plan.digest)
            candidates[name] = plan
    goals = {t: (o["weight"], o["expert"]) for t, o in spec["study"]["tasks"].items()}
    with sqlite3.connect(args.run_dir / "scores.db") as scores:
        rows = {**references, **candidates}
        tables = {task: [_values(scores, p.digest, task) for p in rows.values()] for task in goals}
    meta = {"rows": list(rows), "n_references": len(references), "goals": goals}
    arrays = {task: np.array(table, dtype=np.uint8) for task, table in tables.items()}
    np.savez_compressed(args.out, meta=np.array(json.dumps(meta)), **arrays)
    shapes = ", ".join(f"{task} {table.shape}" for task, table in arrays.items())
    print(f"{args.out}: {len(candidates)} candidates, {len(references)} references; {shapes}")


def _values(scores: sqlite3.Connection, digest: str, task: str) -> list[float]:
    """Return one plan's values on all examples of a task, select before held out."""
    found = []
    for part in PARTS:
        blocks = scores.execute(
            "SELECT vals FROM scores WHERE digest = ? AND task = ? AND part = ? ORDER BY block",
            (digest, task, part),
        )
        found += [value for (text,) in blocks for value in json.loads(text)]
    return found


if __name__ == "__main__":
    main()
