"""Merging on the device: right, and how fast beside a copy of as many bytes."""

import itertools
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from searchmerge.merging.counting import Part, count
from searchmerge.merging.engine import Engine, EngineKind
from searchmerge.merging.measure import Measure, MemoryBudget
from searchmerge.merging.merger import Merger
from searchmerge.merging.method import METHODS, default_plan
from searchmerge.merging.residency import Memory, Residency, free_bytes
from searchmerge.merging.selection import Room, select
from searchmerge.merging.task_vectors import TaskVectors, Weights
from searchmerge.plan import MergePlan
from tests.benchmarks.bench_merging import (
    COPIED_AT_ONCE,
    EXPERTS,
    N_EXPERTS,
    SHAPES,
    Shape,
    parameters,
    synchronize,
    synthetic,
)
from tests.gpu.report import Figures, Step, Wrong
from tests.merging.golden import CASES, Case

FIRST_COMPILED = "p03_n4_t5_tied"
"""The golden case that is compiled first, one output of each way of each method: every number of
experts and every way is compiled for itself."""

_ROOM = Room(most=20_000, in_all=200_000, least=8_000, share=50)
"""So little that order statistics take several passes."""

_KEPT, _ROUNDED = ("iso_c", "tsv"), 2.0**-8
"""Methods that keep matrices, on a GPU in the model's dtype, and by how much of an entry that may
round it."""

_LEFT_FREE = 0.12  # of the device's memory, where as much is merged as fits
_MANY = Shape(
    512, 64, 128, 33, 32
)  # 299 small parameters: what a candidate costs beside its bytes
_ONE_LAYER = replace(SHAPES["135m"], n_layers=1, vocabulary=1024)


@dataclass(frozen=True)
class Bench:
    """Where merging is measured.

    Attributes:
        device: The device.
        engines: Which ways arithmetic is run.
        small: Whether all is done in small, as on a CPU.
        folder: For models on disk.
        n_candidates: How many are timed.
    """

    device: str
    engines: tuple[EngineKind, ...]
    small: bool
    folder: Path
    n_candidates: int = 9

    @property
    def fastest(self) -> EngineKind:
        return "compiled" if "compiled" in self.engines else "eager"

    def first(self) -> Iterator[Step]:
        """Yield the steps that tell most, the most important first."""
        sizes = ("tiny",) if self.small else ("1b", "3b")
        yield Step("golden", "eager", lambda: self._golden("eager", CASES), 60)
        yield Step("merging", f"4 x {sizes[0]}, on the device", lambda: self._resident(sizes[0]))
        yield Step("statistics", "beside a CPU's", self._statistics, 60)
        yield Step("merging", "host-side overhead", self._overhead, 45)
        yield Step("merging", "launched, played, by chunks", self._alike, 60)
        if "compiled" in self.engines:
            yield Step("golden", "compiled, one of each", self._golden_compiled, 60)
        for size in sizes[1:]:
            yield Step("merging", f"4 x {size}, on the device", lambda s=size: self._resident(s))
        yield Step("TSV", "one layer", self._tsv, 60)
        yield Step("merging", f"4 x {sizes[0]}, streamed", lambda: self._streamed(sizes[0]), 60)

    def more(self) -> Iterator[Step]:
        """Yield the steps for which there may be no time: the largest, other cases and methods."""
        if not self.small:
            yield Step("merging", "4 x 7b, on the device", lambda: self._resident("7b"))
        for engine in self.engines:
            yield Step("methods", engine, lambda engine=engine: self._methods(engine), 90)
        if "compiled" in self.engines:
            run = partial(self._golden, "compiled", CASES)
            yield Step("golden", "compiled, all", run, 120, is_open_ended=True)

    def _golden(self, engine: EngineKind, folders: list[Path]) -> Figures:
        """Compare with the authors' outputs."""
        for folder in folders:
            case = Case(folder, self.device)
            worst = case.deviations(engine)
            yield {"what": folder.name, "outputs": len(case.outputs), "not reproduced": len(worst)}
            if worst or not case.outputs:
                raise Wrong(f"{folder.name}: entries off by output: {worst}")

    def _golden_compiled(self) -> Figures:
        [folder] = [path for path in CASES if path.name == FIRST_COMPILED]
        case = Case(folder, self.device)
        for key in case.one_of_each():
            begun = time.perf_counter()
            worst = case.deviations("compiled", [key])
            yield {"what": key, "not reproduced": len(worst), "s": time.perf_counter() - begun}
            if worst:
                raise Wrong(f"{folder.name}: entries off by output: {worst}")

    def _methods(self, engine: EngineKind) -> Figures:
        """Compare every method with what it gives on a CPU, chunk by chunk."""
        base, experts = synthetic(replace(_ONE_LAYER, width=64, inner=96, width_kv=32), "cpu")
        here = Merger(TaskVectors.from_weights(base, experts), engine="eager")
        there = Merger(
            TaskVectors.from_weights(
                moved(base, self.device),
                {e: moved(own, self.device) for e, own in experts.items()},
            ),
            engine=engine,
        )
        for method in METHODS:
            plan = default_plan(method, EXPERTS)
            n_off = n_all = 0
            wanted = dict(here.merged(plan, dtype=torch.float32))
            kept = self._kept(here, base, plan) if method in _KEPT and self.device != "cpu" else {}
            for name, tensor in there.merged(plan, dtype=torch.float32):
                most = 1e-4 * wanted[name].abs() + 1e-5 + _ROUNDED * kept.get(name, 0.0)
                off = (tensor.cpu() - wanted[name]).abs() > most
                n_off += int(off.sum())
                n_all += tensor.numel()
            yield {"what": method, "entries": n_all, "off": n_off}
            if n_off > n_all // 1000:  # what lies at a threshold may fall to either side
                raise Wrong(f"{method}: {n_off} of {n_all} entries differ from those on a CPU")

    def _kept(self, merger: Merger, base: Weights, plan: MergePlan) -> dict[str, torch.Tensor]:
        """Return the magnitude of what is kept of each entry: of all experts, times coefficients.

        What is kept of each expert alone is what its coefficient alone merges.
        """
        [row] = plan.values["coefficient"]
        alone = [[c if i == j else 0.0 for j in range(len(row))] for i, c in enumerate(row)]
        rows = [row] if plan.method == "iso_c" else alone
        total: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
        for each in rows:
            own = replace(plan, values={**plan.values, "coefficient": (tuple(each),)})
            for name, tensor in merger.merged(own, dtype=torch.float32):
                total[name] = total[name] + (tensor - base[name].float()).abs()
        return total

    def _statistics(self) -> Figures:
        shape = SHAPES["tiny"] if self.small else replace(SHAPES["135m"], n_layers=4)
        base, experts = synthetic(shape, self.device)
        there = TaskVectors.from_weights(base, experts)
        here = TaskVectors.from_weights(
            moved(base, "cpu"), {e: moved(own, "cpu") for e, own in experts.items()}
        )
        d = there.n_parameters
        ranks = sorted({0, d - 1, *(d - 1 - int(d * step / 100) for step in range(100))})
        found = [
            [measure.magnitudes([rank] * N_EXPERTS) for rank in ranks]
            for measure in (measured(here, "eager"), measured(there, self.fastest))
        ]
        n_off = sum(
            one != other
            for ours, theirs in zip(*found, strict=True)
            for one, other in zip(ours, theirs, strict=True)
        )
        yield from self._selected()
        yield {"what": "order statistics", "compared": N_EXPERTS * len(ranks), "differ": n_off}
        if n_off:
            raise Wrong(f"{n_off} order statistics differ from those measured on a CPU")

    def _selected(self) -> Figures:
        """Compare what is selected in several passes with a sort: ties, zeros, the smallest."""
        draw, n = torch.Generator().manual_seed(0), 20_011 if self.small else 300_007
        ranks = sorted({0, 1, n - 2, n - 1, *(n * step // 100 for step in range(100))})
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            base = (0.02 * torch.randn(n, generator=draw)).to(dtype)
            noise = 1e-3 * torch.randn(5, n, generator=draw)
            experts = list((base.float() + noise).to(dtype))  # five: more than a launch takes
            experts[0][: n // 3] = base[: n // 3]
            base[-5000:] = 0.0
            experts[1][-5000:] = (torch.arange(5000) % 7 * 2.0**-133).to(dtype)  # subnormal
            rows = [(expert.float() - base.float()).abs() for expert in experts]
            wanted = [row.sort().values[ranks].tolist() for row in rows]
            there = [tensor.to(self.device) for tensor in (base, *experts)]
            numbers = [row.to(self.device) for row in rows]

            def magnitudes(on: Any, there: list[torch.Tensor] = there) -> None:
                count([Part(there[1:], there[0])], on(there[0].device))

            def themselves(on: Any, numbers: list[torch.Tensor] = numbers) -> None:
                count([Part(numbers)], on(numbers[0].device))

            for count_all in (magnitudes, themselves):
                found = select(count_all, n, [ranks] * len(rows), _ROOM)
                n_off = sum(
                    of_row[rank] != number
                    for of_row, numbers_there in zip(found, wanted, strict=True)
                    for rank, number in zip(ranks, numbers_there, strict=True)
                )
                compared = len(rows) * len(ranks)
                what = f"selected {count_all.__name__}, {dtype}"
                yield {"what": what, "compared": compared, "differ": n_off}
                if n_off:
                    raise Wrong(f"{n_off} of {compared} differ from a sort's")

    def _resident(self, size: str) -> Figures:
        shape = self._fitting(SHAPES[size])
        base, experts = synthetic(shape, self.device)
        vectors = TaskVectors.from_weights(base, experts)
        targets = {name: tensor.clone() for name, tensor in base.items()}
        d = vectors.n_parameters
        copy_s = copying_s((N_EXPERTS + 2) * 2 * d, self.device)
        yield {
            "what": "copy",
            "parameters": d,
            "layers": f"{shape.n_layers} of {SHAPES[size].n_layers}",
            "ms": 1e3 * copy_s,
            "GB/s": (N_EXPERTS + 2) * 2 * d / copy_s / 1e9,
        }
        first_s, statistics_s = (self._measuring_s(vectors) for _ in range(2))
        yield {"what": "statistics, all densities", "seconds": statistics_s, "first s": first_s}
        for method, most in (("ties", 1.2), ("pcb", 2.0), ("task_arithmetic", None)):
            merger = Merger(vectors, targets=targets, engine=self.fastest, memory=Memory("device"))
            figures = yield from self._candidates(merger, method, copy_s, most)
            if method == "ties" and not self.small:
                ratio = statistics_s * 1e3 / figures["ms"]
                yield {"what": "statistics to a candidate", "value": ratio, "at most": 10}
            work = default_plan(method, EXPERTS)
            merger.apply(work)
            trace = overlap(lambda m=merger, w=work: m.apply(w), self.device)
            yield {"what": f"{method}, trace", **trace}

    def _measuring_s(self, vectors: TaskVectors) -> float:
        """Return the seconds that the magnitudes of all densities take."""
        synchronize(self.device)
        begun = time.perf_counter()
        measured(vectors, self.fastest).magnitudes([0] * N_EXPERTS)
        return time.perf_counter() - begun

    def _candidates(
        self, merger: Merger, method: str, copy_s: float, most: float | None, where: str = ""
    ) -> Generator[dict[str, Any], None, dict[str, Any]]:
        """Yield how long candidates take, beside a copy; return the last figures.

        TIES elects signs in a pass of its own where it guessed the majority wrong, unless it
        merged the same densities before: candidates are merged once, and then all of them again.
        """
        n_timed = 3 if where and not self.small else self.n_candidates
        plans = list(itertools.islice(drawn(method), n_timed + 2))
        target = {} if most is None or self.small else {"at most": most}
        begun = time.perf_counter()
        merger.apply(plans[0])
        synchronize(self.device)
        first_s = time.perf_counter() - begun
        figures: dict[str, Any] = {}
        for known in (", new densities", "") if method == "ties" else ("",):
            rest = iter(plans[1:])
            times = timed(lambda r=rest: merger.apply(next(r)), self.device, n_timed)
            middle = statistics.median(times)
            figures = {
                "what": f"{method}{where}{known} to the copy",
                "value": middle / copy_s,
                "ms": 1e3 * middle,
                "from": 1e3 * min(times),
                "to": 1e3 * max(times),
                "first s": first_s,
                **target,
            }
            yield figures
        return figures

    def _fitting(self, shape: Shape) -> Shape:
        """Return the shape with as many layers as the device has room for, with its targets."""
        n_bytes = (N_EXPERTS + 2) * 2
        sizes = {n: torch.Size(size).numel() * n_bytes for n, size in parameters(shape)}
        layers = sum(size for name, size in sizes.items() if ".layers." in name)
        room = (1 - _LEFT_FREE) * free_bytes(torch.device(self.device))
        n_fit = int((room - sum(sizes.values()) + layers) / (layers / shape.n_layers))
        if n_fit < 1:
            raise Wrong(f"there is no room for one layer: {room / 2**30:.1f} GiB are free")
        return replace(shape, n_layers=min(shape.n_layers, n_fit))

    def _overhead(self) -> Figures:
        """Measure what a candidate of 299 small parameters takes: all but moving bytes."""
        shape = replace(_MANY, n_layers=3) if self.small else _MANY
        base, experts = synthetic(shape, self.device)
        vectors = TaskVectors.from_weights(base, experts)
        targets = {name: tensor.clone() for name, tensor in base.items()}
        for method in ("ties", "pcb"):
            merger = Merger(vectors, targets=targets, engine=self.fastest)
            plans = itertools.cycle(itertools.islice(drawn(method), 2 + self.n_candidates))
            for _ in range(2 + self.n_candidates):
                merger.apply(next(plans))  # so that every majority is known
            times = timed(
                lambda m=merger, p=plans: m.apply(next(p)), self.device, 2 * self.n_candidates
            )
            yield {
                "what": f"{method}, {len(vectors.weights)} small parameters, ms",
                "value": 1e3 * statistics.median(times),
                **({} if self.small else {"at most": 2.0}),
            }
            counts = launches(lambda m=merger, p=plans: m.apply(next(p)), self.device)
            yield {"what": f"{method}, launches", **counts}

    def _alike(self) -> Figures:
        """Compare what is launched, recorded and played, and with what chunks give.

        Sizes are such that entries are left over after the last row, or make up no row at all.
        """
        draw = torch.Generator(self.device).manual_seed(1)
        sizes = {"a": (999, 97), "b": (64,), "c": (65,), "d": (63,), "e": (), "f": (2049, 3)}
        base = {n: torch.randn(s, generator=draw, device=self.device) for n, s in sizes.items()}
        experts = {
            e: {
                n: t + 0.3 * torch.randn(t.shape, generator=draw, device=t.device)
                for n, t in base.items()
            }
            for e in EXPERTS
        }
        base = {name: tensor.bfloat16() for name, tensor in base.items()}
        experts = {e: {n: t.bfloat16() for n, t in own.items()} for e, own in experts.items()}
        vectors = TaskVectors.from_weights(base, experts)
        for method in ("ties", "pcb", "task_arithmetic", "dare"):
            plan, other = itertools.islice(drawn(method), 2)
            results = {}
            for engine in dict.fromkeys(("eager", self.fastest)):
                targets = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
                merger = Merger(vectors, targets=targets, engine=engine)
                for step, each in enumerate((plan, other, plan, other)):
                    merger.apply(each)
                    results[engine, step] = {n: t.clone() for n, t in targets.items()}
            last = [results[self.fastest, step] for step in range(4)]
            n_off = differing(last[0], last[2]) + differing(last[1], last[3])
            n_apart = differing(results["eager", 3], last[3], rtol=1e-2, atol=1e-5)
            yield {"what": method, "played otherwise": n_off, "chunks otherwise": n_apart}
            if n_off or n_apart > 200:  # of 103,000: what is at a threshold may fall either way
                raise Wrong(f"{method}: {n_off} and {n_apart} entries differ")

    def _streamed(self, size: str) -> Figures:
        """Merge from host memory: page-locked, and mapped from files."""
        shape = SHAPES[size] if self.small else replace(SHAPES[size], n_layers=4, vocabulary=32768)
        base, experts = synthetic(shape, self.device)
        for name, weights in {"base": base, **experts}.items():
            save_file(moved(weights, "cpu"), self.folder / f"{name}.safetensors")
        targets, d = base, sum(tensor.numel() for tensor in base.values())
        del experts, weights
        vectors = TaskVectors.from_weights(
            load_file(self.folder / "base.safetensors"),
            {e: load_file(self.folder / f"{e}.safetensors") for e in EXPERTS},
        )
        copy_s = copying_s((N_EXPERTS + 1) * 2 * d, self.device, pinned=True)
        yield {"what": "copy from page-locked memory", "parameters": d, "ms": 1e3 * copy_s}
        residencies: list[Residency] = ["pinned", "mapped"]
        for residency in residencies if self.device != "cpu" else residencies[1:]:
            merger = Merger(
                vectors, targets=targets, engine=self.fastest, memory=Memory(residency)
            )
            for method in ("ties", "pcb"):
                yield from self._candidates(merger, method, copy_s, None, f", {residency}")
                if residency == "pinned":
                    plan = default_plan(method, EXPERTS)
                    trace = overlap(lambda p=plan, m=merger: m.apply(p), self.device)
                    yield {"what": f"{method}, {residency}, trace", **trace}

    def _tsv(self) -> Figures:
        shape = SHAPES["tiny"] if self.small else replace(SHAPES["1b"], n_layers=1, vocabulary=64)
        base, experts = synthetic(replace(shape, n_layers=1), self.device)
        targets = {name: tensor.clone() for name, tensor in base.items()}
        for method in ("tsv", "iso_c"):
            merger = Merger(TaskVectors.from_weights(base, experts), targets=targets)
            plans = drawn(method)
            for which in ("first", "next", "later"):
                begun = time.perf_counter()
                merger.apply(next(plans))
                synchronize(self.device)
                seconds = time.perf_counter() - begun
                yield {"what": f"{method}, {which} candidate of a layer", "seconds": seconds}
            if not all(bool(torch.isfinite(tensor).all()) for tensor in targets.values()):
                raise Wrong(f"{method}: what was merged is not finite")


def moved(weights: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in weights.items()}


def measured(vectors: TaskVectors, engine: EngineKind) -> Measure:
    return Measure(vectors, Engine(engine), MemoryBudget(0))


def differing(one: Weights, other: Weights, *, rtol: float = 0.0, atol: float = 0.0) -> int:
    """Return how many entries of two models are not close, or not equal."""
    return sum(
        int((~torch.isclose(tensor, other[name], rtol=rtol, atol=atol)).sum())
        for name, tensor in one.items()
    )


def drawn(method: str) -> Iterator[MergePlan]:
    """Yield plans with coefficients and densities drawn with a seed, without end."""
    draw = random.Random(0)
    for _ in itertools.count():
        numbers: dict[str, Any] = {"coefficient": [draw.uniform(0.5, 1.5) for _ in EXPERTS]}
        if method in ("ties", "pcb"):
            numbers["density"] = [draw.randrange(5, 40) / 100 for _ in EXPERTS]
        yield default_plan(method, EXPERTS, **numbers)


def timed(run: Callable[[], object], device: str, n_times: int) -> list[float]:
    """Return the seconds that each of some runs takes, after one that is not counted."""
    seconds = []
    for _ in range(n_times + 1):
        synchronize(device)
        begun = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return seconds[1:]


def copying_s(n_bytes: int, device: str, *, pinned: bool = False) -> float:
    """Return the seconds that moving so many bytes takes: on the device, or to it if pinned.

    On the device a copy moves every byte twice, as it is read and written.
    """
    is_cuda = device.startswith("cuda")
    from_host = pinned and is_cuda
    total = n_bytes if from_host else n_bytes // 2
    size = min(total, COPIED_AT_ONCE)
    target = torch.zeros(size, dtype=torch.uint8, device=device)
    source = torch.zeros(size, dtype=torch.uint8, device="cpu" if from_host else device)
    source = source.pin_memory() if from_host else source
    whole, rest = divmod(total, size)

    def run() -> None:
        for _ in range(whole):
            target.copy_(source, non_blocking=True)
        target[:rest].copy_(source[:rest], non_blocking=True)

    return statistics.median(timed(run, device, 5))


def _profiled(run: Callable[[], object], device: str) -> list[Any]:
    activities = [ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as trace:
        run()
        synchronize(device)
    return list(trace.events())


def launches(run: Callable[[], object], device: str) -> dict[str, int]:
    """Return how many kernels and copies one run starts; on a CPU, how many operations."""
    names = [event.name for event in _profiled(run, device)]
    if not device.startswith("cuda"):
        return {"operations": sum(name.startswith("aten::") for name in names)}
    return {
        "kernels": sum("LaunchKernel" in name for name in names),
        "graphs": sum("GraphLaunch" in name for name in names),
        "copies": sum(name.startswith("cudaMemcpy") for name in names),
    }


def overlap(run: Callable[[], object], device: str) -> dict[str, float]:
    """Return for how many ms the device copies and computes, and for how many both at once."""
    on_device = [e for e in _profiled(run, device) if e.device_type.name == "CUDA"]
    spans = {True: [], False: []}
    for event in on_device:
        is_copy = event.name.startswith("Memcpy")
        spans[is_copy].append((event.time_range.start, event.time_range.end))
    copying, computing = covered(spans[True]), covered(spans[False])
    both = copying + computing - covered(spans[True] + spans[False])
    return {
        "copying ms": copying / 1e3,
        "computing ms": computing / 1e3,
        "both ms": both / 1e3,
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total
