"""Measures what the driver of a study costs: throughput, time a trial, memory, share of a core.

    python tests/benchmarks/bench_execution.py [--quick] [--only NAME]

Workers here only wait: simulated ones in this process, and real Ray actors that sleep. Trials take
log-normal times (sigma 0.6), in five rounds of twelve examples. Every study is a real one: SQLite
storage and random sampler unless a table says otherwise, score cache on disk. Prints markdown
tables.
"""

import argparse
import functools
import heapq
import itertools
import logging
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.blocks import BlockScores, Round, make_blocks
from searchmerge.execution.executor import Event, Executor, Finished, Scored, WorkerState
from searchmerge.execution.worker import RoundResult, Worker
from searchmerge.plan import MergePlan
from searchmerge.search.auto_space import auto_space
from searchmerge.search.budget import Budget
from searchmerge.search.directory import StudyDirectory
from searchmerge.search.dispatch import Dispatcher
from searchmerge.search.objective import Goal, Objective
from searchmerge.search.runner import StudyRunner
from searchmerge.search.sampler import SamplerSetting, sampler_after
from searchmerge.search.schedule import Schedule
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.searched import Range
from searchmerge.search.space import Alternative, SearchSpace
from searchmerge.search.trials import TrialRecord, begin

EXPERTS = ("math", "code", "chat")
SPACE = SearchSpace(
    EXPERTS, [Alternative("t", "task_arithmetic", values={"coefficient": Range(0.0, 1.0)})]
)
INFO = TaskInfo(40)
OBJECTIVE = Objective("mean", {task: Goal() for task in EXPERTS})
SIGMA = 0.6


def make_schedule() -> Schedule:
    """Return 60 examples to select by, in five rounds, and as many held out."""
    blocks = {
        part: {task: make_blocks(task, part, examples, INFO, 4) for task in EXPERTS}
        for part, examples in (("select", range(20)), ("hold_out", range(20, 40)))
    }
    return Schedule.interleaved(dict.fromkeys(EXPERTS, INFO), blocks, round_blocks=3, seed=0)


SCHEDULE = make_schedule()
N_ROUNDS = len(SCHEDULE.rounds["select"])


def seconds_of(plan: MergePlan, mean_s: float) -> float:
    """Return how long a plan's trial takes: log-normal, the same for equal plans."""
    if not mean_s:
        return 0.0
    return mean_s * random.Random(plan.digest).lognormvariate(-(SIGMA**2) / 2, SIGMA)


def scores_of(plan: MergePlan, blocks: Round) -> tuple[BlockScores, ...]:
    """Return made-up scores, the better the nearer the coefficients are to 0.5."""
    base = 1.0 - sum((c - 0.5) ** 2 for c in plan.values["coefficient"][0])
    return tuple(
        BlockScores(block, tuple(base + 0.01 * math.sin(e) for e in block.examples))
        for block in blocks
    )


class Simulated:
    """Workers that only wait, in this process."""

    def __init__(self, n_workers: int, mean_s: float) -> None:
        self.n_free = n_workers
        self._mean_s = mean_s
        self._due: list[tuple[float, int, int, Iterator[RoundResult], float]] = []
        self._stopped: set[int] = set()
        self._count = itertools.count()

    def tasks(self) -> dict[str, TaskInfo]:
        """Return the tasks."""
        return dict.fromkeys(EXPERTS, INFO)

    def workers(self) -> list[WorkerState]:
        """Return one for each job, called by its number."""
        return [
            WorkerState(f"worker {job}", "", "", "working", job)
            for _, _, job, _, _ in self._due
            if job not in self._stopped
        ]

    def submit(self, job: int, plan: MergePlan, rounds: Sequence[Round]) -> None:
        """Let a worker begin."""
        self.n_free -= 1
        step = seconds_of(plan, self._mean_s) / N_ROUNDS
        results = (RoundResult(scores_of(plan, blocks), 0.0, step) for blocks in rounds)
        self._push(time.monotonic() + step, job, results, step)

    def stop(self, job: int) -> None:
        """Give up a job."""
        self._stopped.add(job)
        self.n_free += 1

    def next_event(self, timeout_s: float) -> Event | None:
        """Wait for the next round that is due."""
        until = time.monotonic() + timeout_s
        while self._due and self._due[0][0] <= until:
            due, _, job, results, step = heapq.heappop(self._due)
            if job in self._stopped:
                self._stopped.discard(job)
                continue
            time.sleep(max(0.0, due - time.monotonic()))
            result = next(results, None)
            if result is None:
                self.n_free += 1
                return Finished(job)
            is_last = result.scores[0].block in SCHEDULE.rounds["select"][-1]
            self._push(due if is_last else due + step, job, results, step)
            return Scored(job, result)
        return None

    def close(self) -> None:
        """Do nothing."""

    def _push(self, due: float, job: int, results: Iterator[RoundResult], step: float) -> None:
        heapq.heappush(self._due, (due, next(self._count), job, results, step))


class Remembers:
    """Keeps the plan in place of merging it."""

    plan: MergePlan

    def apply(self, plan: MergePlan) -> None:
        """Keep the plan."""
        self.plan = plan


class Sleeps:
    """Sleeps as long as the plan's trial takes, in place of scoring."""

    def __init__(self, merger: Remembers, mean_s: float) -> None:
        self.tasks = dict.fromkeys(EXPERTS, INFO)
        self._merger = merger
        self._mean_s = mean_s

    def score(self, model: nn.Module, task: str, examples: Sequence[int]) -> tuple[float, ...]:
        """Sleep, and return zeros."""
        share = len(examples) / sum(len(b.examples) for r in SCHEDULE.rounds["select"] for b in r)
        time.sleep(seconds_of(self._merger.plan, self._mean_s) * share)
        return (0.0,) * len(examples)


def make_sleeper(mean_s: float) -> Worker:
    """Return a worker that sleeps; runs in a Ray actor."""
    merger = Remembers()
    return Worker(nn.Identity(), merger, dict.fromkeys(EXPERTS, Sleeps(merger, mean_s)))


class Clock:
    """An observer that notes when each trial ended, its work, and what the process took."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.cpu_s: list[float] = []
        self.sizes: list[float] = []
        self.work_s = 0.0

    def phase(self, title: str, total: int | None, done: int = 0) -> None:
        """Do nothing."""

    def step(self, name: str, scores: object) -> None:
        """Do nothing."""

    def trial(self, record: TrialRecord, *, is_best: bool) -> None:
        """Note the time, the seconds that a worker was at it, and the size."""
        self.work_s += record.seconds
        self.ends.append(time.perf_counter())
        self.cpu_s.append(time.process_time())
        self.sizes.append(resident_mib())


def resident_mib() -> float:
    """Return the memory that this process holds, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True)
class Setting:
    """What a study searches, how, and where it writes.

    Attributes:
        space: What it searches.
        sampler: By what.
        is_journal: Whether trials are kept in a journal file, not in SQLite.
    """

    space: SearchSpace = SPACE
    sampler: str = "random"
    is_journal: bool = False


RANDOM = Setting()


@contextmanager
def directory(setting: Setting = RANDOM) -> Iterator[StudyDirectory]:
    """Make a study in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        sampler = sampler_after(setting.sampler, SamplerSetting(seed=0, space=setting.space))
        storage = f"journal:{folder}/journal.log" if setting.is_journal else None
        with closing(
            StudyDirectory(Path(folder), name="b", spec={}, sampler=sampler, storage=storage)
        ) as opened:
            yield opened


def run(
    executor: Executor, n_trials: int, setting: Setting = RANDOM
) -> tuple[Clock, float, float]:
    """Run a study; return its clock, its wall time and the CPU time of this process."""
    clock = Clock()
    with directory(setting) as opened:
        dispatcher = Dispatcher(executor, opened.scores, opened.run_dir)
        board = Scoreboard(SCHEDULE, opened.scores)
        runner = StudyRunner(opened, setting.space, board, dispatcher, {}, clock)
        cpu, start = time.process_time(), time.perf_counter()
        runner.run(OBJECTIVE, Budget(n_trials), None)
        return clock, time.perf_counter() - start, time.process_time() - cpu


def ray_pool(n_workers: int, mean_s: float) -> Executor:
    """Start Ray actors that sleep; several share a core."""
    from searchmerge.execution.ray.cluster import RaySettings
    from searchmerge.execution.ray.pool import RayExecutor

    share = max(0.01, math.floor(90 * (os.cpu_count() or 1) / n_workers) / 100)
    pool = RayExecutor(
        functools.partial(make_sleeper, mean_s), RaySettings(workers=n_workers, cpus=share)
    )
    pool.tasks()
    while pool.n_free < n_workers:
        pool.next_event(1.0)
    return pool


def simulated_pool(n_workers: int, mean_s: float) -> Executor:
    """Return simulated workers."""
    return Simulated(n_workers, mean_s)


POOLS: dict[str, Callable[[int, float], Executor]] = {
    "simulated": simulated_pool,
    "Ray actors": ray_pool,
}


def bench_throughput(quick: bool) -> None:
    """Compare eight workers with eight times one, whole runs with their beginnings and ends.

    Trials are not the same ones in both runs, so what is compared is work: the seconds of
    finished trials in every second that passes.
    """
    mean_s, n_one, n_eight = (1.0, 10, 80) if quick else (3.0, 20, 480)
    print("| workers | trials | mean s a trial | work s / s | to 8 x one worker |")
    print("|---|---|---|---|---|")
    for name, pool in POOLS.items():
        rates = []
        for n_workers, n_trials in ((1, n_one), (8, n_eight)):
            with closing(pool(n_workers, mean_s)) as executor:
                clock, wall, _ = run(executor, n_trials)
            rates.append(clock.work_s / wall)
            ratio = f"{rates[1] / 8 / rates[0]:.3f}" if n_workers == 8 else ""
            print(f"| {name}, {n_workers} | {n_trials} | {mean_s} | {rates[-1]:.3f} | {ratio} |")


def bare_optuna(n_trials: int) -> list[float]:
    """Write to the storage what a study writes, and do nothing else; return when trials ended."""
    ends = []
    scores = dict.fromkeys(EXPERTS, 0.5)
    with directory() as opened:
        for _ in range(n_trials):
            trial = opened.study.ask()
            plan = SPACE.suggest(trial)
            begin(trial, plan)
            TrialRecord.of(trial, plan).judged(OBJECTIVE, scores).write(trial)
            opened.study.tell(trial, 0.5)
            ends.append(time.perf_counter())
    return ends


def bench_overhead(quick: bool) -> None:
    """Compare a study whose workers take no time with what Optuna's storage takes by itself."""
    n_trials, window = (120, 60) if quick else (1000, 200)
    clock, _, _ = run(Simulated(1, 0.0), n_trials)
    ends = bare_optuna(n_trials)
    ours, bare = (1000 * (e[-1] - e[-window - 1]) / window for e in (clock.ends, ends))
    print(f"\n| at trial {n_trials} | ms a trial |\n|---|---|")
    print(f"| a study, workers that take no time | {ours:.1f} |")
    print(f"| the same writes to Optuna's storage alone | {bare:.1f} |")
    print(f"| what the driver adds | {ours - bare:.1f} |")


def bench_memory(quick: bool) -> None:
    """Show the size of the process as trials pass."""
    n_trials = 200 if quick else 2000
    clock, _, _ = run(Simulated(8, 0.0), n_trials)
    marks = [n_trials * i // 4 for i in range(1, 5)]
    print("\n| after trials | MiB held |\n|---|---|")
    for mark in marks:
        print(f"| {mark} | {clock.sizes[mark - 1]:.1f} |")


def bench_share(quick: bool) -> None:
    """Show the share of a core that the driver takes of many workers."""
    n_trials = 64 if quick else 200
    print("\n| workers | mean s a trial | trials/s | CPU ms a trial | share of a core |")
    print("|---|---|---|---|---|")
    cases = [("simulated", 64, 30.0), ("simulated", 64, 10.0), ("Ray actors", 16, 2.5)]
    for name, n_workers, mean_s in cases:
        mean_s = mean_s / 10 if quick else mean_s
        with closing(POOLS[name](n_workers, mean_s)) as executor:
            _, wall, cpu = run(executor, n_trials)
        print(
            f"| {name}, {n_workers} | {mean_s:g} | {n_trials / wall:.2f} "
            f"| {1000 * cpu / n_trials:.1f} | {100 * cpu / wall:.1f} % |"
        )


def bench_fleet(quick: bool) -> None:
    """Show what a long search on 64 workers costs its driver, with the default space and sampler.

    "Busy" is the share of time that workers work. As trials become shorter the driver, one
    process, becomes the limit.
    """
    n_trials = 128 if quick else 2000
    auto = Setting(auto_space(EXPERTS), "auto")
    settings = (auto, replace(auto, is_journal=True))
    cases = [(mean_s, setting) for mean_s in (10.0, 2.0) for setting in settings]
    print("\n| storage | mean s a trial | trials/s | busy | CPU ms, first and last quarter |")
    print("|---|---|---|---|---|")
    for mean_s, setting in cases:
        mean_s = mean_s / 10 if quick else mean_s
        clock, wall, _ = run(Simulated(64, mean_s), n_trials, setting)
        marks = [clock.cpu_s[i * (len(clock.cpu_s) - 1) // 4] for i in (0, 1, 3, 4)]
        first, last = (4000 * (b - a) / len(clock.cpu_s) for a, b in (marks[:2], marks[2:]))
        print(
            f"| {'journal' if setting.is_journal else 'SQLite'} | {mean_s:g} "
            f"| {n_trials / wall:.2f} | {100 * clock.work_s / wall / 64:.0f} % "
            f"| {first:.0f}, {last:.0f} |",
            flush=True,
        )


BENCHES = {
    "throughput": bench_throughput,
    "overhead": bench_overhead,
    "memory": bench_memory,
    "share": bench_share,
    "fleet": bench_fleet,
}


def main() -> None:
    """Run the benchmarks that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--only", choices=BENCHES, help="one of the benchmarks")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    for name, bench in BENCHES.items():
        if arguments.only in (None, name):
            bench(arguments.quick)


if __name__ == "__main__":
    main()
