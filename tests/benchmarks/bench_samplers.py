"""What samplers find with many workers that never wait: simulated clock, known functions.

    python tests/benchmarks/bench_samplers.py [--seeds 10] [--samplers async optuna tpe gp]

Trial times are log-normal, so that results come back in another order than they were asked in.
Prints the median regret, its quartiles, and the share of finished trials that a sampler's
distribution never saw.
"""

import argparse
import functools
import heapq
import math
import multiprocessing
import time
import warnings
from collections import Counter

import numpy as np
import optuna
from optuna.distributions import FloatDistribution

from searchmerge.search.samplers.async_cma import AsyncCmaSampler

LOW, HIGH = 0.0, 2.0
BEST = 0.7  # every coordinate of the optimum


def space(n_axes):
    return {f"x{i:02d}": FloatDistribution(LOW, HIGH) for i in range(n_axes)}


@functools.cache
def rotation(n_axes):
    matrix = np.random.default_rng(n_axes).standard_normal((n_axes, n_axes))
    return np.linalg.qr(matrix)[0]


def sphere(x):
    return float(np.sum((x - BEST) ** 2))


def ellipsoid(x):
    """Rotated, axes of condition 1,000."""
    scales = 1000.0 ** (np.arange(len(x)) / (len(x) - 1))
    return float(np.sum(scales * (rotation(len(x)) @ (x - BEST)) ** 2)) / 100


def rosenbrock(x):
    z = 2 * (x - BEST) + 1  # the optimum is at 1 in every coordinate
    return float(np.sum(100 * (z[1:] - z[:-1] ** 2) ** 2 + (1 - z[:-1]) ** 2)) / 100


FUNCTIONS = {"sphere": sphere, "ellipsoid": ellipsoid, "rosenbrock": rosenbrock}
SAMPLERS = {
    "async": lambda d, seed: AsyncCmaSampler(space(d), seed=seed),
    "optuna": lambda d, seed: optuna.samplers.CmaEsSampler(seed=seed),
    "tpe": lambda d, seed: optuna.samplers.TPESampler(seed=seed),
    "gp": lambda d, seed: optuna.samplers.GPSampler(seed=seed, deterministic_objective=True),
    "random": lambda d, seed: optuna.samplers.RandomSampler(seed=seed),
}


def run(job):
    """Return one study's regret, the share of trials left unused, and seconds in the sampler."""
    sampler_name, function_name, n_axes, n_workers, n_trials, seed = job
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    function, distributions = FUNCTIONS[function_name], space(n_axes)
    sampler = SAMPLERS[sampler_name](n_axes, seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    clock_noise = np.random.default_rng(seed)
    running, now, asking_s = [], 0.0, 0.0
    for _ in range(n_trials):
        while len(running) < n_workers:
            begin = time.perf_counter()
            trial = study.ask(distributions)
            asking_s += time.perf_counter() - begin
            end = now + clock_noise.lognormal(0.0, 0.5)
            heapq.heappush(running, (end, trial.number, trial))
        now, _, trial = heapq.heappop(running)
        study.tell(trial, -function(np.array(list(trial.params.values()))))
    return -study.best_value, unused(sampler_name, sampler, study), asking_s


def unused(sampler_name, sampler, study):
    finished = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    if sampler_name == "async":
        # the last to finish are known only to the next ask: make one
        study.ask(sampler.infer_relative_search_space(study, study.trials[0]))
        return 1 - sampler.n_told / len(finished)
    if sampler_name != "optuna":
        return math.nan
    generations = Counter(t.system_attrs.get("cma:generation", -1) for t in finished)
    n_axes = len(finished[0].params)
    popsize = 4 + int(3 * math.log(n_axes))
    used = sum(min(n, popsize) for g, n in generations.items() if g >= 0)
    return 1 - used / len(finished)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=240)
    parser.add_argument("--workers", type=int, nargs="+", default=[16])
    parser.add_argument("--axes", type=int, nargs="+", default=[8, 24])
    parser.add_argument("--samplers", nargs="+", default=["async", "optuna"], choices=SAMPLERS)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    print(f"{args.trials} trials, {args.seeds} seeds, log-normal trial times (sigma 0.5)")
    print("function      d  workers  sampler   regret: median [quartiles]      unused  ask ms")
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for function in FUNCTIONS:
            for n_axes in args.axes:
                for n_workers in args.workers:
                    for sampler in args.samplers:
                        jobs = [
                            (sampler, function, n_axes, n_workers, args.trials, seed)
                            for seed in range(args.seeds)
                        ]
                        report(function, n_axes, n_workers, sampler, pool.map(run, jobs), args)


def report(function, n_axes, n_workers, sampler, results, args):
    regret, unused_share, asking_s = (np.array(column) for column in zip(*results, strict=True))
    low, middle, high = np.quantile(regret, [0.25, 0.5, 0.75])
    ask_ms = 1000 * float(np.median(asking_s)) / args.trials
    share = "" if math.isnan(unused_share[0]) else f"{100 * np.mean(unused_share):.0f} %"
    print(
        f"{function:11s} {n_axes:3d}  {n_workers:7d}  {sampler:8s} "
        f"{middle:9.4f} [{low:.4f}, {high:.4f}] {share:>12s} {ask_ms:7.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
