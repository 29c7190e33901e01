"""A Ray cluster: started or joined, how much room it has, and what its errors say."""

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray
from ray.exceptions import (
    RaySystemError,
)

from searchmerge.errors import StudyError

_logger = logging.getLogger(__name__)

_STORE_BYTES = 128 * 2**20  # only plans and scores go through the object store


@dataclass(frozen=True, slots=True)
class RaySettings:
    """Where the workers are, and what each of them needs.

    Attributes:
        address: ``local`` starts Ray on this machine for this run, ``auto`` is the cluster that
            this machine belongs to, ``host:port`` one that is named.
        workers: How many; ``None`` for as many as the cluster has room for at any time.
        cpus: CPUs of each, more than 0.
        gpus: GPUs of each: below 1 several share one, above 1 each has several.
        deadline_s: Seconds that one round of a job may take; ``None`` to derive them from the
            rounds seen so far (:class:`Deadline`).
    """

    address: str = "local"
    workers: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    deadline_s: float | None = None


def connect(address: str) -> bool:
    """Start Ray or join a cluster, unless this process did so already; return whether it did now.

    Raises:
        StudyError: If there is no cluster at ``address``.
    """
    if ray.is_initialized():
        return False
    if address not in ("local", "auto"):
        check_reachable(address)
    options: dict[str, Any] = {}
    if address == "local":
        options = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    logging.getLogger("ray").setLevel(logging.ERROR)  # it logs before it reads its own option
    try:
        with _signals_held():
            ray.init(
                address=address,
                logging_level=logging.ERROR,
                log_to_driver=_logger.isEnabledFor(logging.INFO),
                **options,
            )
    except (ConnectionError, RaySystemError, ValueError, OSError) as error:
        raise StudyError(f"ray.address {address}: {short(error)}") from error
    except BaseException:
        ray.shutdown()
        raise
    return True


def check_reachable(address: str) -> None:
    """Refuse at once an address where nothing listens; Ray would try for minutes.

    Raises:
        StudyError: If nothing listens there.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
    except OSError as error:
        raise StudyError(
            f"ray.address {address}: no cluster answers there ({error}); "
            "`ray start --head` prints the address of one"
        ) from error


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back the first SIGINT or SIGTERM: Ray swallows one, and ends the process on the other.

    Ray also leaves a SIGTERM handler of its own behind, which is undone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    held: list[int] = []

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            restore()
            signal.raise_signal(number)
        held.append(number)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    except SystemExit:
        held.append(signal.SIGTERM)
    finally:
        restore()
    if held:
        signal.raise_signal(held[0])


def count_room(settings: RaySettings) -> int:
    """Return how many workers fit on the nodes there are, if nothing else runs on them."""
    return sum(
        min(
            int(resources.get(name, 0.0) / need + 1e-9)
            for name, need in (("CPU", settings.cpus), ("GPU", settings.gpus))
            if need
        )
        for resources in (node["Resources"] for node in ray.nodes() if node["Alive"])
    )


def short(error: BaseException) -> str:
    """Return the line of Ray's message that says what happened, without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return last.partition(" Some common causes")[0][:300]


def amounts(resources: Mapping[str, float]) -> str:
    """Return resources as words: ``4 CPUs and 1 GPUs``."""
    named = {name: resources.get(name, 0.0) for name in ("CPU", "GPU")}
    return (
        " and ".join(f"{amount:g} {name}s" for name, amount in named.items() if amount) or "none"
    )


def place(address: str) -> str:
    """Return what a cluster is called in messages."""
    return "this machine" if address == "local" else f"the cluster ({address})"
