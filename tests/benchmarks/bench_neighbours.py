"""How long merging and scoring take beside busy neighbours, with threads that spin or sleep.

    python tests/benchmarks/bench_neighbours.py [--neighbours 1] [--rounds 5]

Each figure is of a process of its own: TIES of four experts of 135M parameters, compiled, and
forward passes of a small Llama, as in a trial. A neighbour is a process as busy as this one: one
thread per processor that never waits. Rounds with and without neighbours take turns, and so do
the ways of waiting; the table gives the median, and its ratio to the quiet one of the same way.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict

from searchmerge.machine import SOON_ASLEEP, wait_asleep

AS_A_RUN = "as a run does"
WAYS = {
    "asleep at once": {"OMP_WAIT_POLICY": "passive"},
    "soon asleep": SOON_ASLEEP,
    AS_A_RUN: {},
    "as torch does": {},
}
MEASURED = ("OMP_WAIT_POLICY", *SOON_ASLEEP, "OMP_NUM_THREADS", "MKL_NUM_THREADS")

BUSY = "while True: pass"


def measure(size: str, n_times: int) -> dict[str, float]:
    """Return the seconds of a merge and of a round of forward passes."""
    import time

    import torch

    from searchmerge.merging.merger import Merger
    from searchmerge.merging.task_vectors import TaskVectors
    from tests.benchmarks.bench_merging import SHAPES, synthetic
    from tests.gpu.merging import drawn
    from tests.gpu.scoring import language_model

    base, experts = synthetic(SHAPES[size], "cpu")
    targets = {name: tensor.clone() for name, tensor in base.items()}
    merger = Merger(TaskVectors.from_weights(base, experts), targets=targets, engine="compiled")
    plans = drawn("ties")

    def timed(run) -> float:
        run()
        seconds = []
        for _ in range(n_times):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    found = {"merge": timed(lambda: merger.apply(next(plans)))}
    with language_model(SHAPES[size], torch.bfloat16, "cpu") as model, torch.inference_mode():
        tokens = torch.arange(512).view(4, 128) % SHAPES[size].vocabulary
        found["forward"] = timed(lambda: model(tokens, logits_to_keep=1))
    return found


def run(way: str, n_neighbours: int, options: argparse.Namespace) -> dict[str, float]:
    """Return what a process of its own measures beside so many neighbours."""
    inherited = {name: value for name, value in os.environ.items() if name not in MEASURED}
    n_busy = n_neighbours * len(os.sched_getaffinity(0))
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(n_busy)]
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", way, "--size", options.size],
            env={**inherited, **WAYS[way]},
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print a table of all ways of waiting, quiet and beside neighbours."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neighbours", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="135m")
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        if options.measure == AS_A_RUN:
            wait_asleep()  # by what runs beside it
        print(json.dumps(measure(options.size, options.times)))
        return
    seconds: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors", flush=True)
    for _ in range(options.rounds):
        for n in (0, options.neighbours):
            for way in WAYS:
                found = run(way, n, options)
                seconds[way, n].append(found)
                told = ", ".join(f"{what} {1e3 * own:.0f} ms" for what, own in found.items())
                print(f"  {way}, {n} neighbours: {told}", flush=True)
    print("| threads that wait | neighbours | merge ms | to quiet | forward ms | to quiet |")
    print("|---|---|---|---|---|---|")
    for way, n in seconds:
        cells = []
        for what in ("merge", "forward"):
            own, quiet = (
                statistics.median(one[what] for one in seconds[way, each]) for each in (n, 0)
            )
            cells += [f"{1e3 * own:.0f}", f"{own / quiet:.2f}"]
        print(f"| {way} | {n} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
