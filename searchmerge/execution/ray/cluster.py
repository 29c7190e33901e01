"""A Ray cluster: started or joined, how much room it has, and what its errors say."""

import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray
from ray.exceptions import (
    RaySystemError,
)

from searchmerge.errors import StudyError

_logger = logging.getLogger(__name__)

HEAD_SILENT_S = 30.0
"""How long the head may be silent before the study stops; Ray itself ends the driver after 60."""
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
            rounds that were seen on the same node so far (:class:`Deadline`).
        loading_s: Seconds that a worker may take to load, and before that to begin to.
    """

    address: str = "local"
    workers: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    deadline_s: float | None = None
    loading_s: float = 3600.0

    @property
    def needs(self) -> str:
        """What each worker needs, in words."""
        return amounts({"CPU": self.cpus, "GPU": self.gpus})


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
    if (error := unreachable(address)) is not None:
        raise StudyError(
            f"ray.address {address}: no cluster answers there ({error}); "
            "`ray start --head` prints the address of one"
        ) from error


def unreachable(address: str, timeout_s: float = 10.0) -> OSError | None:
    """Return why nothing can be reached at ``host:port``; ``None`` where something listens."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except OSError as error:
        return error
    return None


class Head:
    """The head of the cluster that this process has joined: without it, none goes on.

    A head may be started anew and go on, so it is given time. Any call to it meanwhile would
    hang, and after a minute end this process with no word of ours.

    Args:
        address: Where it listens, ``host:port``.
        name: What the cluster is called in messages.
        now: Returns the present second, on any clock that never goes back.
    """

    def __init__(self, address: str, name: str, now: Callable[[], float] = time.monotonic) -> None:
        self._address = address
        self._name = name
        self._now = now
        self._silent_since: float | None = None

    def answers(self) -> bool:
        """Return whether the head can be asked anything at present.

        Raises:
            StudyError: If it has not answered for ``HEAD_SILENT_S``.
        """
        error = unreachable(self._address, timeout_s=2.0)
        if error is None:
            self._silent_since = None
            return True
        if self._silent_since is None:
            self._silent_since = self._now()
            _logger.warning(
                "the Ray head of %s does not answer (%s); waiting for it, %g s at the most",
                self._name,
                error,
                HEAD_SILENT_S,
            )
        if self._now() - self._silent_since < HEAD_SILENT_S:
            return False
        raise StudyError(
            f"the Ray head of {self._name} died: nothing answers at {self._address} for "
            f"{HEAD_SILENT_S:g} s ({error}); all that was scored is kept, and once Ray runs again "
            "the same command goes on"
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
