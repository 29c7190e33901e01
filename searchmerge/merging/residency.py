"""Where base and experts lie while they are merged."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from searchmerge.errors import SpecError
from searchmerge.merging.task_vectors import TaskVectors

_logger = logging.getLogger(__name__)

Residency = Literal["auto", "device", "pinned", "mapped"]

_LEFT_FREE = 0.35  # of a GPU's free memory, for activations


@dataclass(frozen=True, slots=True)
class Memory:
    """How a merger uses memory; it changes the time taken, and nothing else but the rounding.

    Attributes:
        residency: ``device`` copies base and experts to where the targets lie; ``pinned`` to
            page-locked host memory, from where each parameter is streamed while the one before
            it is merged; ``mapped`` leaves them as they were loaded, e.g. mapped from a file
            that other processes share. ``auto`` is ``device`` if they fit into two thirds of
            the free memory, else ``pinned`` if they fit into half of the host's, else
            ``mapped``; on a CPU ``mapped``.
        keep_bytes: How much methods may keep of what they measured; ``None`` for half of what
            is free where parameters are merged, once base and experts are placed.
    """

    residency: Residency = "auto"
    keep_bytes: int | None = None

    def budget_bytes(self, device: torch.device) -> int:
        """Return how much methods may keep on ``device``."""
        if self.keep_bytes is not None:
            return self.keep_bytes
        return free_bytes(device) // 2


def free_bytes(device: torch.device) -> int:
    """Return how much memory can still be had on a device, within this process's limits."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = [_proc_available(), _cgroup_available()]
    return min((size for size in available if size is not None), default=0)


def _proc_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return sizes[0] * 1024 if sizes else None


def _cgroup_available() -> int | None:
    """Return what the control group, such as a container's, leaves; ``None`` for no limit."""
    root = Path("/sys/fs/cgroup")
    files = [
        (root / "memory.max", root / "memory.current"),
        (root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes"),
    ]
    for limit_file, used_file in files:
        try:
            limit, used = limit_file.read_text().strip(), used_file.read_text().strip()
        except OSError:
            continue
        return None if limit == "max" else max(0, int(limit) - int(used))
    return None


def place(
    vectors: TaskVectors, devices: Mapping[str, torch.device], residency: Residency
) -> TaskVectors:
    """Return the task vectors where they are to lie while they are merged.

    Args:
        vectors: As loaded.
        devices: Parameter name to the device that it is merged on; a model may be spread over
            several.
        residency: See :class:`Memory`.

    Raises:
        SpecError: If ``device`` or ``pinned`` was asked for and there is not enough memory.
    """
    needed: dict[torch.device, int] = {}
    for name, device in devices.items():
        tensors = [vectors.base[name], *vectors.weights[name]]
        moved = sum(tensor.nbytes for tensor in tensors if tensor.device != device)
        needed[device] = needed.get(device, 0) + moved
    if residency == "auto":
        residency = _choose(needed)
        _logger.info("base and experts are held: %s", residency)
    if residency == "mapped" or not any(needed.values()):
        return vectors
    if residency == "pinned":
        return _moved(vectors, devices, lambda tensor, _: tensor.cpu().pin_memory())
    try:
        return _moved(vectors, devices, lambda tensor, device: tensor.to(device))
    except torch.OutOfMemoryError as error:
        raise SpecError(
            f"residency: base and experts need {_gib(needed)} GiB on their devices, which do not "
            "have it; use pinned or mapped"
        ) from error


def _choose(needed: Mapping[torch.device, int]) -> Residency:
    on_gpu = {device: size for device, size in needed.items() if device.type != "cpu"}
    if not on_gpu:
        return "mapped"
    if all(fits_device(size, free_bytes(device)) for device, size in on_gpu.items()):
        return "device"
    free = free_bytes(torch.device("cpu"))
    return "pinned" if fits_pinned(sum(on_gpu.values()), free) else "mapped"


def fits_device(size_bytes: float, free: float) -> bool:
    """Return whether base and experts are held on a device with this much free memory."""
    return size_bytes <= (1 - _LEFT_FREE) * free


def fits_pinned(size_bytes: float, free: float) -> bool:
    """Return whether base and experts are held in page-locked memory of a host."""
    return size_bytes <= free / 2


def _gib(needed: Mapping[torch.device, int]) -> float:
    return round(sum(needed.values()) / 2**30, 1)


def _moved(
    vectors: TaskVectors,
    devices: Mapping[str, torch.device],
    move: Callable[[Tensor, torch.device], Tensor],
) -> TaskVectors:
    base, weights = dict(vectors.base), dict(vectors.weights)
    for name, device in devices.items():
        base[name] = move(base[name].detach(), device)
        weights[name] = tuple(move(expert.detach(), device) for expert in weights[name])
    return replace(vectors, base=base, weights=weights)


Flat = tuple[Tensor, ...]


def streamed(
    names: Sequence[str],
    read: Callable[[str], Flat],
    devices: Mapping[str, torch.device],
) -> Iterator[tuple[str, Flat]]:
    """Yield each parameter's tensors on the device that it is merged on.

    Tensors that lie in host memory are copied to a GPU on a stream of its own, one parameter
    ahead of the one that is yielded, so that copying and merging overlap.

    Args:
        names: The parameters, in order.
        read: Name to the base's and the experts' entries, 1-D, wherever they lie.
        devices: Name to device.
    """
    if all(device.type != "cuda" for device in devices.values()):
        for name in names:
            yield name, tuple(tensor.to(devices[name]) for tensor in read(name))
        return
    streams = {
        device: torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        for device in dict.fromkeys(devices.values())
        if device.type == "cuda"
    }
    ahead: tuple[str, Flat] | None = None
    for name in names:
        fetched = (name, _fetch(read(name), devices[name], streams.get(devices[name])))
        if ahead is not None:
            yield _arrived(ahead, devices, streams)
        ahead = fetched
    if ahead is not None:
        yield _arrived(ahead, devices, streams)


def _fetch(tensors: Flat, device: torch.device, stream: "torch.cuda.Stream | None") -> Flat:
    if stream is None or all(tensor.device == device for tensor in tensors):
        return tuple(tensor.to(device) for tensor in tensors)
    with torch.cuda.stream(stream):
        return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


def _arrived(
    item: tuple[str, Flat],
    devices: Mapping[str, torch.device],
    streams: "Mapping[torch.device, torch.cuda.Stream]",
) -> tuple[str, Flat]:
    """Make the current stream wait until a parameter has been copied."""
    name, tensors = item
    device = devices[name]
    if device in streams:
        current = torch.cuda.current_stream(device)
        current.wait_stream(streams[device])
        for tensor in tensors:
            tensor.record_stream(current)
    return item
