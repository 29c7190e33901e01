"""Run a study with racing, without it, and as random search, for the same time each.

python compare.py STUDY [--timeout 150s] [--seeds 0 1 2] [--config FILE] [--set KEY=VALUE ...]

The time is that of the search alone. Prints, for each seed, the trials and the held-out
objective of each confirmed winner, in points, and the means. An interrupted run goes on.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

WITHOUT = ["search.racing=off", "search.round_blocks=24"]  # long rounds are scored faster
ARMS = {
    "racing": ["search.round_blocks=6"],
    "no racing": WITHOUT,
    "random": [*WITHOUT, "search.sampler=random"],
}
RUN = [sys.executable, "-c", "from searchmerge.cli import main; main()", "run"]


def main() -> None:
    """Run every arm under every seed, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--timeout", default="150s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", type=Path)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--set", nargs="*", default=[], dest="overrides")
    args = parser.parse_args()
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    print("seed  arm        trials  full  held out  best baseline", flush=True)
    for seed in args.seeds:
        for arm, own in ARMS.items():
            name = f"compare-{args.study.name}-{arm.replace(' ', '-')}-{seed}"
            settings = [f"name={name}", f"search.seed={seed}", f"search.timeout={args.timeout}"]
            settings += ["search.n_trials=200", *own, *args.overrides]
            flags = [flag for setting in settings for flag in ("--set", setting)]
            config = ["--config", str(args.config)] if args.config else []
            run_dir = args.runs_dir / name
            command = [*RUN, str(args.study), *config, "--runs-dir", str(args.runs_dir), *flags]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            results = json.loads((run_dir / "results.json").read_text())
            rows = {row["name"]: row for row in results["rows"]}
            value = 100 * rows[results["winner"]]["objective"][0]
            baseline = 100 * max(r["objective"][0] for r in rows.values() if not r["is_candidate"])
            full = results["counts"]["trials in full"]
            n_trials = full + results["counts"]["trials stopped early"]
            found[arm].append(value)
            counts = f"{n_trials:6.0f}  {full:4.0f}"
            print(f"{seed:4d}  {arm:9s}  {counts}  {value:8.2f}  {baseline:8.2f}", flush=True)
    for arm, values in found.items():
        spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
        print(f"mean  {arm:9s}  held out {np.mean(values):.2f}, standard deviation {spread:.2f}")


if __name__ == "__main__":
    main()
