"""A study on Ray in a process of its own, to be killed: RUN_DIR N_TRIALS DELAY_S ADDRESS."""

import functools
import sys
from pathlib import Path

from searchmerge.execution.ray.cluster import RaySettings
from searchmerge.execution.ray.pool import RayExecutor
from tests.execution import workers
from tests.search.conftest import Toy


def main(run_dir, n_trials, delay_s, address):
    notes = run_dir / "notes"
    notes.mkdir(exist_ok=True)
    study = Toy(run_dir)
    study.executor = RayExecutor(
        functools.partial(workers.make, notes, delay_s),
        RaySettings(address, workers=2, cpus=0.5),
    )
    try:
        study.run(n_trials)
    finally:
        study.executor.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
