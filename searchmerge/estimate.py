"""What a worker will need, from headers alone, and whether the machine has it."""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from searchmerge.checkpoints.checkpoint import Checkpoint
from searchmerge.checkpoints.embeddings import aliases
from searchmerge.merging.residency import fits_device, fits_pinned, free_bytes

_PROCESS_BYTES = 2 * 2**30  # of a worker's process without any model: its libraries, measured
_LOGIT_ROWS = 1024  # reduced at once, in float32
_MOST_READS = 8192  # logits of a batch are computed where they are read, of no more places
_COPIED_BYTES = 2**27  # to find out how fast memory is copied


@dataclass(frozen=True, slots=True)
class Needs:
    """What one worker needs, in bytes.

    Attributes:
        resident: The model that is scored.
        sources: Base and experts, as stored.
        widest: The largest parameter of base and experts together.
        activations: Of the largest batch.
        saved: The model that is written in the end.
        shard: The largest file of the models.
        moved: What a merge reads and writes.
        n_tokens: Of the largest batch.
    """

    resident: int
    sources: int
    widest: int
    activations: int
    saved: int
    shard: int
    moved: int
    n_tokens: int

    @property
    def streamed(self) -> int:
        """What a device needs where base and experts are streamed: two parameters at a time."""
        return 2 * self.widest


@dataclass(frozen=True, slots=True)
class Room:
    """What this machine has for a worker, in bytes.

    Attributes:
        kind: Of device, e.g. ``"cuda"``.
        device: Free on all devices of a worker together; that of the host on a CPU.
        n_devices: How many a worker has.
        host: Free on the host.
        disk: Free where the model will be saved.
        n_workers: Workers that share the host.
        rate: Bytes a second that the device reads and writes when it copies.
        link: Bytes a second that reach the devices of a worker from page-locked memory.
    """

    kind: str
    device: float
    n_devices: int
    host: float
    disk: float
    n_workers: int
    rate: float
    link: float


def needs(
    base: Checkpoint, experts: Sequence[Checkpoint], dtype: torch.dtype, n_tokens: int
) -> Needs:
    """Return what a worker needs; nothing but headers is read.

    Args:
        base: The base model.
        experts: What is merged with it.
        dtype: Of the resident model, and of the saved one.
        n_tokens: Tokens of one forward pass.
    """
    again = aliases(base.headers, base.config)
    headers = {name: header for name, header in base.headers.items() if name not in again}
    sizes = {name: prod(header.shape) for name, header in headers.items()}
    resident = sum(sizes.values()) * dtype.itemsize
    stored = sum(header.size_bytes for header in headers.values())
    expert_bytes = [
        sum(e.headers[n].size_bytes for n in headers if n in e.headers) for e in experts
    ]
    widest = max((header.size_bytes for header in headers.values()), default=0) * (
        1 + len(experts)
    )
    files = {file for model in (base, *experts) for file in model.own_files.values()}
    return Needs(
        resident=resident,
        sources=stored + sum(expert_bytes),
        widest=widest,
        activations=_activations([header.shape for header in headers.values()], n_tokens, dtype),
        saved=resident,
        shard=max((file.stat().st_size for file in files), default=0),
        moved=resident + stored + sum(expert_bytes),
        n_tokens=n_tokens,
    )


def _activations(shapes: Sequence[tuple[int, ...]], n_tokens: int, dtype: torch.dtype) -> int:
    """Return about how many bytes a batch takes beside the weights.

    Of a layer what its widest matrices make, in and out; of the embedding, the widest of all,
    the logits of the batch and the float32 copy of some of them.
    """
    matrices = sorted((shape for shape in shapes if len(shape) == 2), key=prod)
    if not matrices:
        return 0
    vocabulary, width = max(matrices[-1]), min(matrices[-1])
    inner = max((max(shape) for shape in matrices[:-1] if max(shape) != vocabulary), default=width)
    layer = n_tokens * dtype.itemsize * (8 * width + 4 * inner)
    logits = min(n_tokens, _MOST_READS) * vocabulary * dtype.itemsize
    return layer + logits + 4 * _LOGIT_ROWS * vocabulary


def room(device: str, share: float, n_workers: int, folder: Path) -> Room:
    """Return what this machine has for a worker.

    Args:
        device: Where models lie, e.g. ``"cuda"``.
        share: GPUs of a worker; below 1 several share one.
        n_workers: Workers on this machine.
        folder: On the disk where the model will be saved.
    """
    kind = torch.device(device).type
    host = free_bytes(torch.device("cpu"))
    n_devices = max(1, int(share))
    if kind == "cuda" and n_devices > 1:
        free = float(sum(free_bytes(torch.device("cuda", i)) for i in range(n_devices)))
    else:
        free = free_bytes(torch.device(device)) * (
            min(1.0, share) if share and kind == "cuda" else 1
        )
    disk = shutil.disk_usage(folder).free
    target = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device)
    rate = link = 2 * _copied_a_second(torch.zeros_like(target), target)
    if kind == "cuda":
        locked = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
        link = n_devices * _copied_a_second(locked, target)
    return Room(kind, free, n_devices, host, disk, n_workers, rate, link)


def _copied_a_second(source: Tensor, target: Tensor) -> float:
    """Return how many bytes are copied in a second."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)
        target[:1].cpu()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return target.nbytes / best


def describe(need: Needs, have: Room | None) -> Iterator[str]:
    """Yield what a worker needs beside what there is, line by line.

    Args:
        need: See :func:`needs`.
        have: Of this machine; ``None`` where workers are elsewhere.
    """
    batch = f"{_gib(need.activations)} for {need.n_tokens} tokens at once"
    models = f"{_gib(need.resident)} for the resident model, {batch}"
    if have is None:
        yield (
            f"memory: each worker needs {models}, and {_gib(need.sources)} for base and experts "
            f"on its device or in its host; this machine has none of the workers"
        )
    elif have.kind == "cpu":
        yield f"memory: {models}; {_gib(have.host)} are free"
        yield (
            f"mapped: {_gib(need.sources)} of base and experts are read in every merge, from "
            f"files that all workers share"
        )
    else:
        yield f"memory on the device: {models}; {_gib(have.device)} are free"
        yield f"base and experts: {_gib(need.sources)}, {_residency(need, have)}"
    if have is not None:
        yield f"disk: {_gib(need.saved)} for the saved model, {_gib(have.disk)} are free"
        yield f"time: {_time(need, have)}"


def _is_held(need: Needs, have: Room) -> bool:
    """Return whether base and experts lie where they are merged, or a CPU reads them in place."""
    return have.kind == "cpu" or fits_device(need.sources, have.device - need.resident)


def _time(need: Needs, have: Room) -> str:
    """Return how long a merge takes that waits for memory alone, in words."""
    if _is_held(need, have):
        size, rate, what = need.moved, have.rate, "that this device copies"
    else:
        size, rate, what = need.sources, have.link, "that the host sends from page-locked memory"
        if not fits_pinned(size * have.n_workers, have.host):
            what += ", and several times that from files"
    return f"a merge moves {_gib(size)}, {size / rate:.3f} s at the {rate / 1e9:.0f} GB/s {what}"


def _residency(need: Needs, have: Room) -> str:
    """Return where base and experts will be held, in words."""
    if _is_held(need, have):
        return "held on the device"
    if fits_pinned(need.sources * have.n_workers, have.host):
        return f"streamed from page-locked memory of the host, of which {_gib(have.host)} are free"
    return "streamed from the mapped files, which is slower"


def refusal(need: Needs, have: Room) -> str:
    """Return why a worker cannot run on this machine; nothing where it can."""
    least = need.resident + need.activations
    if have.kind != "cpu" and least + need.streamed > have.device:
        where = "the device" if have.n_devices == 1 else f"{have.n_devices} devices"
        return (
            f"the resident model ({_gib(need.resident)}), a batch of {need.n_tokens} tokens "
            f"({_gib(need.activations)}) and parameters on their way ({_gib(need.streamed)}) need "
            f"{_gib(least + need.streamed)} of {where}, with {_gib(have.device)} free; give each "
            "worker more GPUs (ray.gpus_per_worker) or set a smaller batch_tokens"
        )
    hosted = (least if have.kind == "cpu" else need.shard) + _PROCESS_BYTES
    if hosted * have.n_workers > have.host:
        what = "the resident model and a batch" if have.kind == "cpu" else "a worker's process"
        each = f"{have.n_workers} workers need {_gib(hosted)} each" if have.n_workers > 1 else ""
        return (
            f"{what} need {_gib(hosted)} of the host's memory"
            + (f" ({each})" if each else "")
            + f", of which {_gib(have.host)} are free; use fewer workers, a smaller dtype or "
            "another machine"
        )
    if need.saved > have.disk:
        return f"the saved model needs {_gib(need.saved)} of disk; {_gib(have.disk)} are free"
    return ""


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
