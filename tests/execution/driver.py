"""A study on Ray in a process of its own, to be killed."""

import argparse
import functools
from pathlib import Path

from searchmerge.execution.ray.cluster import RaySettings
from searchmerge.execution.ray.pool import RayExecutor
from tests.execution import workers
from tests.search.conftest import Toy


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("n_trials", type=int)
    parser.add_argument("--address", default="local")
    parser.add_argument("--delay-s", type=float, default=0.0, help="of each call of an evaluator")
    parser.add_argument("--load-s", type=float, default=0.0, help="how long a worker loads")
    parser.add_argument("--storage", help="as in a config")
    parser.add_argument("--workers", type=int, help="as many as there is room for by default")
    parser.add_argument("--cpus", type=float, default=0.5, help="of each worker")
    given = parser.parse_args()
    notes = given.run_dir / "notes"
    notes.mkdir(exist_ok=True)
    study = Toy(given.run_dir, storage=given.storage)
    study.executor = RayExecutor(
        functools.partial(workers.make, notes, given.delay_s, given.load_s),
        RaySettings(given.address, given.workers, given.cpus),
    )
    try:
        study.run(given.n_trials)
    finally:
        study.executor.close()


if __name__ == "__main__":
    main()
