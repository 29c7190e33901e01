"""How fast and how frugal the merging core is, beside a copy of memory and other code.

Usage: python tests/benchmarks/bench_merging.py [--size 135m] [--device cpu] [--only copy ties]

    --size 1b             4 experts of 1B parameters, mapped from files (12 GiB, in --folder)
    --size 7b --device cuda    4 experts of 7B parameters on one GPU (about 90 GiB)

Synthetic experts of a Llama, in bf16. Every row is measured in this one process, one after the
other; each number is the median of some candidates with different densities and coefficients,
with the fastest and slowest beside it. A ratio is to the plain copy of as many bytes as one
candidate must move: (n + 2) * 2 bytes per parameter.

The naive implementations and mergekit hold several float32 copies of everything: they are run up
to 135m alone, mergekit where it is installed (``pip install -e .[mergekit]``).
"""

import argparse
import gc
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from searchmerge.merging.engine import Engine
from searchmerge.merging.measure import Measure, MemoryBudget
from searchmerge.merging.merger import Merger
from searchmerge.merging.method import default_plan
from searchmerge.merging.residency import Memory
from searchmerge.merging.task_vectors import TaskVectors

N_EXPERTS = 4
EXPERTS = tuple(f"expert{i}" for i in range(N_EXPERTS))
MIB, GIB = 2**20, 2**30
COPIED_AT_ONCE = GIB  # bytes
ON_DISK = ("1b",)  # sizes that are mapped from files on a CPU
WHOLE_COPIES = ("tiny", "135m")  # sizes at which other code is run


@dataclass(frozen=True)
class Shape:
    vocabulary: int
    width: int
    inner: int
    n_layers: int
    width_kv: int


SHAPES = {
    "tiny": Shape(512, 64, 128, 4, 32),
    "135m": Shape(49152, 576, 1536, 30, 192),
    "1b": Shape(128256, 2048, 8192, 16, 512),
    "3b": Shape(128256, 3072, 8192, 28, 1024),
    "7b": Shape(128256, 4096, 12288, 32, 1024),
}


def parameters(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.width)
    for i in range(shape.n_layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (shape.width,)
        for name, rows in (("q", shape.width), ("k", shape.width_kv), ("v", shape.width_kv)):
            yield f"{layer}.self_attn.{name}_proj.weight", (rows, shape.width)
        yield f"{layer}.self_attn.o_proj.weight", (shape.width, shape.width)
        for name in ("gate", "up"):
            yield f"{layer}.mlp.{name}_proj.weight", (shape.inner, shape.width)
        yield f"{layer}.mlp.down_proj.weight", (shape.width, shape.inner)
        yield f"{layer}.post_attention_layernorm.weight", (shape.width,)
    yield "model.norm.weight", (shape.width,)


def synthetic(shape: Shape, device: str) -> tuple[dict, dict]:
    """Return a base and experts that differ from it by heavy-tailed noise."""
    draw = torch.Generator(device).manual_seed(0)
    base, experts = {}, {expert: {} for expert in EXPERTS}
    for name, size in parameters(shape):
        weight = torch.randn(size, generator=draw, device=device).mul_(0.05)
        base[name] = weight.bfloat16()
        for own in experts.values():
            noise = torch.randn(size, generator=draw, device=device)
            noise.mul_(noise.abs()).mul_(1e-3)
            own[name] = noise.add_(base[name]).bfloat16()
    return base, experts


def on_disk(shape: Shape, folder: Path) -> tuple[dict, dict]:
    """Return the same, mapped from files, holding two models in memory at most to write them."""
    draw = torch.Generator().manual_seed(0)
    sizes = dict(parameters(shape))
    base = {n: torch.randn(s, generator=draw).mul_(0.05).bfloat16() for n, s in sizes.items()}
    save_file(base, folder / "base.safetensors")
    for expert in EXPERTS:
        own = {}
        for name, weight in base.items():
            noise = torch.randn(weight.shape, generator=draw)
            own[name] = noise.mul_(noise.abs()).mul_(1e-3).add_(weight).bfloat16()
        save_file(own, folder / f"{expert}.safetensors")
    del base, own
    gc.collect()
    return load_file(folder / "base.safetensors"), {
        expert: load_file(folder / f"{expert}.safetensors") for expert in EXPERTS
    }


@dataclass
class Row:
    name: str
    times_s: list[float]
    moved_bytes: int
    extra_mib: float = 0.0
    notes: str = ""


@dataclass
class Bench:
    size: str
    device: str
    n_candidates: int
    folder: Path
    rows: list[Row] = field(default_factory=list)
    most_bytes: int = 0
    most_own_bytes: int = 0

    def __post_init__(self) -> None:
        shape = SHAPES[self.size]
        if self.size in ON_DISK and self.device == "cpu":
            self.base, self.experts = on_disk(shape, self.folder)
        else:
            self.base, self.experts = synthetic(shape, self.device)
        self.vectors = TaskVectors.from_weights(self.base, self.experts)
        self.targets = {
            name: t.clone() for name, t in self.base.items()
        }  # in memory, not promised
        self.d = self.vectors.n_parameters
        self.bytes = (N_EXPERTS + 2) * 2 * self.d
        self.random = random.Random(0)

    def record(self, name: str, run: Callable[[], object], **more: object) -> Row:
        """Measure ``run``, which makes one candidate."""
        gc.collect()
        n_times = more.pop("n", self.n_candidates)
        warm_ups = more.pop("warm_ups", 1)
        before = reset_peak(self.device)
        for _ in range(warm_ups):
            run()
        times = []
        for _ in range(n_times):
            start = time.perf_counter()
            run()
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        self.note_peak()
        extra = max(0.0, (peak(self.device) - before) / MIB)
        row = Row(
            name, times, int(more.pop("moved", self.bytes)), extra, str(more.pop("notes", ""))
        )
        self.rows.append(row)
        print(f"  {name}: {1e3 * statistics.median(times):.1f} ms", flush=True)
        return row

    def note_peak(self) -> None:
        self.most_bytes = max(self.most_bytes, peak(self.device))
        self.most_own_bytes = max(self.most_own_bytes, status_bytes("RssAnon"))

    def plan(self, method: str, *, density: float | None = None):
        numbers = {"coefficient": [self.random.uniform(0.5, 1.5) for _ in EXPERTS]}
        if method in ("ties", "pcb"):
            drawn = [self.random.randrange(5, 40) / 100 for _ in EXPERTS]
            numbers["density"] = drawn if density is None else density
        return default_plan(method, EXPERTS, **numbers)

    def copy(self) -> None:
        n_bytes = min(self.bytes // 2, COPIED_AT_ONCE)
        one = torch.zeros(n_bytes, dtype=torch.uint8, device=self.device)
        other = torch.zeros_like(one)
        n_whole, rest = divmod(self.bytes // 2, len(one))

        def run() -> None:
            for _ in range(n_whole):
                other.copy_(one)
            other[:rest].copy_(one[:rest])

        self.record("plain copy", run)

    def ours(self, method: str, engine: str, **memory: int) -> None:
        kind = f"{method}, {engine}"
        budget = Memory(**memory).budget_bytes(torch.device(self.device))
        keeps = self.device == "cpu" and 4 * N_EXPERTS * self.d <= budget
        if method == "pcb" and memory.get("keep_bytes") != 0 and not keeps:
            print(f"  {kind}, β kept: skipped, there is no memory to keep it")
            return
        merger = Merger(self.vectors, targets=self.targets, engine=engine, memory=Memory(**memory))
        start, before = time.perf_counter(), reset_peak(self.device)
        merger.apply(self.plan(method))
        synchronize(self.device)
        first_s, extra = time.perf_counter() - start, (peak(self.device) - before) / MIB
        self.note_peak()
        notes = f"first candidate {first_s:.1f} s, {extra:.0f} MiB"
        if method == "pcb":
            kind += ", β kept" if memory.get("keep_bytes") != 0 else ", β computed"
        self.record(kind, lambda: merger.apply(self.plan(method)), notes=notes)
        if method == "pcb" and memory.get("keep_bytes") != 0:
            fixed = 0.1
            self.record(
                f"{kind}, coefficients alone change",
                lambda: merger.apply(self.plan(method, density=fixed)),
                warm_ups=3,
            )

    def statistics(self) -> None:
        def measure() -> None:
            measured = Measure(self.vectors, Engine("eager"), MemoryBudget(0))
            measured.magnitudes([0] * N_EXPERTS)

        read = N_EXPERTS * 2 * 4 * self.d  # base and expert, twice
        self.record("statistics of |τ|, all densities", measure, n=3, warm_ups=0, moved=read)

    def naive(self, method: str) -> None:
        """Merge as one would write it down: flat float32 vectors, each sorted."""
        if self.size not in WHOLE_COPIES:
            print(f"  naive {method}: skipped, it takes too much memory at {self.size}")
            return
        merge = {"ties": naive_ties, "pcb": naive_pcb}[method]
        names = list(self.base)
        base = torch.cat([self.base[name].flatten() for name in names]).float()
        deltas = torch.stack(
            [
                torch.cat([own[name].flatten() for name in names]).float() - base
                for own in self.experts.values()
            ]
        )

        def run() -> None:
            plan = self.plan(method)
            merged = merge(deltas, plan.values["density"][0], plan.values["coefficient"][0])
            start = 0
            for name in names:
                target = self.targets[name]
                stop = start + target.numel()
                target.copy_((base[start:stop] + merged[start:stop]).view(target.shape))
                start = stop

        self.record(f"naive {method}, whole vectors", run, n=1, warm_ups=0)

    def mergekit(self) -> None:
        """Merge with mergekit in memory, if it is installed."""
        if self.size not in WHOLE_COPIES:
            print(f"  mergekit: skipped, it takes too much memory at {self.size}")
            return
        try:
            from mergekit.merge_methods.api import merge_state_dicts
        except ImportError as error:
            print(f"  mergekit: skipped, it is not installed ({error})")
            return
        models = {"base": self.base, **self.experts}
        parameters = {"weight": 1.0, "density": 0.2}

        def run() -> None:
            with torch.no_grad():
                merge_state_dicts(models, "ties", parameters=parameters, base="base")

        self.record("mergekit ties, in memory", run, n=3, warm_ups=0)


def naive_ties(deltas, densities, coefficients):
    trimmed = deltas.clone()
    for own, density in zip(trimmed, densities, strict=True):
        k = own.numel() - int(own.numel() * density)
        own[own.abs() < own.abs().kthvalue(k).values] = 0
    signs = torch.sign(trimmed.sum(0))
    signs[signs == 0] = torch.sign(signs.sum())
    agreeing = torch.where(trimmed.sign() == signs, trimmed, 0)
    total = (agreeing * torch.tensor(coefficients)[:, None]).sum(0)
    return total / (agreeing != 0).sum(0).clamp(min=1)


def naive_pcb(deltas, densities, coefficients):
    d = deltas.shape[1]
    ranks = [int(d * 1e-4), int(d * (1 - 1e-4) - 1)]
    low, high = torch.stack([own.abs().sort().values[ranks] for own in deltas]).T
    sizes = deltas.abs().clamp(low[:, None], high[:, None])
    scaled = (sizes - low[:, None]) / (high - low)[:, None]
    balance = torch.exp(len(deltas) * scaled**2) * torch.tanh(deltas * deltas.sum(0))
    ranks = [int(d * (1 - r)) for r in densities]
    lightest = torch.stack(
        [own.sort().values[rank] for own, rank in zip(balance, ranks, strict=True)]
    )
    heaviest = balance.amax(1)
    kept = balance.clamp(min=lightest[:, None]) - lightest[:, None]
    kept /= (heaviest - lightest)[:, None]
    total = (torch.tensor(coefficients)[:, None] * deltas.sign() * sizes * kept).sum(0)
    return total / kept.sum(0).clamp(min=1e-12)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def reset_peak(device: str) -> int:
    """Forget the peak of memory so far; return what is in use."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def peak(device: str) -> int:
    return (
        torch.cuda.max_memory_allocated() if device.startswith("cuda") else status_bytes("VmHWM")
    )


def status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def table(rows: list[Row]) -> str:
    copy_s = next((statistics.median(r.times_s) for r in rows if r.name == "plain copy"), None)
    lines = [
        "| what | ms a candidate | fastest to slowest | GB/s | extra MiB | to the copy | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        middle = statistics.median(row.times_s)
        ratio = f"{middle / copy_s:.2f}" if copy_s else ""
        spread = f"{1e3 * min(row.times_s):.0f} to {1e3 * max(row.times_s):.0f}"
        rate = row.moved_bytes / middle / 1e9
        lines.append(
            f"| {row.name} | {1e3 * middle:.1f} | {spread} | {rate:.1f} | {row.extra_mib:.0f} "
            f"| {ratio} | {row.notes} |"
        )
    return "\n".join(lines)


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    models = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SHAPES, default="135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--candidates", type=int, default=9)
    parser.add_argument("--only", nargs="*", help="words that a row's name must have one of")
    parser.add_argument("--folder", type=Path, help="where models on disk go; they are deleted")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run(arguments, Path(folder))


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Run every step that was asked for, and print the table."""
    bench = Bench(arguments.size, arguments.device, arguments.candidates, folder)
    print(
        f"{N_EXPERTS} experts of {bench.d:,} parameters in bf16; "
        f"{device_name(arguments.device)}, {torch.get_num_threads()} threads; "
        f"torch {torch.__version__}; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    steps: dict[str, Callable[[], None]] = {
        "copy": bench.copy,
        "statistics": bench.statistics,
        "task_arithmetic compiled": lambda: bench.ours("task_arithmetic", "compiled"),
        "task_arithmetic eager": lambda: bench.ours("task_arithmetic", "eager"),
        "ties compiled": lambda: bench.ours("ties", "compiled"),
        "ties eager": lambda: bench.ours("ties", "eager"),
        "pcb compiled kept": lambda: bench.ours("pcb", "compiled"),
        "pcb compiled computed": lambda: bench.ours("pcb", "compiled", keep_bytes=0),
        "pcb eager kept": lambda: bench.ours("pcb", "eager"),
        "naive ties": lambda: bench.naive("ties"),
        "naive pcb": lambda: bench.naive("pcb"),
        "mergekit": bench.mergekit,
    }
    for name, step in steps.items():
        if not arguments.only or any(all(w in name for w in o.split("+")) for o in arguments.only):
            step()
    print("\n" + table(bench.rows))
    print(f"\npeak memory, the models included: {bench.most_bytes / GIB:.1f} GiB", end="")
    own = f"; {bench.most_own_bytes / GIB:.1f} GiB without the pages of mapped files"
    print(own if arguments.device == "cpu" else " on the device")


if __name__ == "__main__":
    main()
