"""The actors of a pool: asked for, heard of as soon as one has something to say, killed."""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray

from searchmerge.execution.deadline import Work
from searchmerge.execution.ray.actor import RayWorker
from searchmerge.execution.ray.cluster import RaySettings
from searchmerge.execution.worker import Worker

_IDLE_S = 0.1  # how long a wait is where there is nothing to wait for
_PASSED_ON = (
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "TOKENIZERS_PARALLELISM",
    "TQDM_DISABLE",
    "HF_DATASETS_DISABLE_PROGRESS_BARS",
)
"""Variables of this process's environment that every actor has too."""


@dataclass(slots=True, eq=False)
class Slot:
    """One actor of the pool.

    Attributes:
        number: Its number among all that there were.
        actor: Ray's handle.
        call: What is waited for: the stream of loading, or of a job; ``None`` when idle.
        since: When it was last heard from, or asked for something.
        node: Where it runs; empty until Ray has put it there.
        host: What that node's machine is called.
        device: Where its model lies; empty until it has loaded.
        job: What it works on.
        has_begun: Whether it took that job up.
        work: What that job is made of.
    """

    number: int
    actor: Any
    call: Any
    since: float
    node: str = ""
    host: str = ""
    device: str = ""
    job: int | None = None
    has_begun: bool = False
    work: Work = "round"

    @property
    def name(self) -> str:
        """What it is called."""
        return f"worker {self.number}"

    @property
    def at(self) -> str:
        """What it is called in messages: with its node."""
        return f"{self.name} on {self.host}" if self.host else self.name

    @property
    def doing(self) -> Literal["waiting", "loading", "idle", "working"]:
        """What it is at."""
        if self.device:
            return "idle" if self.call is None else "working"
        return "loading" if self.node else "waiting"

    @property
    def is_free(self) -> bool:
        """Whether nothing is waited for."""
        return self.call is None


class Slots:
    """The actors that there are.

    Args:
        make_worker: Loads a worker, in the actor's process; it must be picklable.
        settings: What each of them needs.
    """

    def __init__(self, make_worker: Callable[[], Worker], settings: RaySettings) -> None:
        self._make_worker = make_worker
        self._actor_class: Any = ray.remote(
            num_cpus=settings.cpus,
            num_gpus=settings.gpus,
            max_restarts=0,  # a restart is seen a second later, and as two errors
            scheduling_strategy="SPREAD",
        )(RayWorker)
        self._slots: list[Slot] = []
        self._ready: deque[tuple[Slot, Any]] = deque()
        self._n_asked = 0

    def __iter__(self) -> Iterator[Slot]:
        return iter(tuple(self._slots))

    def __len__(self) -> int:
        return len(self._slots)

    def n_at(self) -> Counter[str]:
        """Return how many workers each node has."""
        return Counter(slot.node for slot in self._slots if slot.node)

    def ask(self, full: Sequence[str]) -> None:
        """Ask for one more actor, which begins to load once Ray has put it on a node.

        Args:
            full: Nodes where it may not be put.
        """
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        options: dict[str, Any] = {}
        if full:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(full)})"}
        actor = self._actor_class.options(**options).remote(environment)
        loading = actor.load.options(num_returns="streaming").remote(self._make_worker)
        self._n_asked += 1
        self._slots.append(Slot(self._n_asked, actor, loading, time.monotonic()))

    def drop(self, slot: Slot) -> None:
        """Make sure that an actor is dead, and let its place be taken."""
        slot.call = None
        self._slots.remove(slot)
        ray.kill(slot.actor)

    def drop_all(self) -> None:
        """Kill all actors."""
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots.clear()
        self._ready.clear()

    def next_ready(self, timeout_s: float) -> Slot | None:
        """Return a slot that has something to say, or ``None`` if none has in that time."""
        if not self._ready:
            self._wait(timeout_s)
        while self._ready:
            slot, call = self._ready.popleft()
            if slot.call is call:  # it was not given up in the meantime
                return slot
        return None

    def _wait(self, timeout_s: float) -> None:
        """Wait until some slots have something to say."""
        waiting = {slot.call: slot for slot in self._slots if slot.call is not None}
        if not waiting:
            time.sleep(min(timeout_s, _IDLE_S))
            return
        calls = list(waiting)
        if not ray.wait(calls, num_returns=1, timeout=timeout_s, fetch_local=False)[0]:
            return
        # all that are ready, so that none is served twice before another is served once
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0, fetch_local=False)
        self._ready.extend((waiting[call], call) for call in ready)
