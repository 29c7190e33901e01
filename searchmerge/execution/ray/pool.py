"""The executor that runs jobs on a pool of Ray actors, each with one resident model."""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    RayError,
    RayTaskError,
)

from searchmerge.errors import EvaluationError, SearchMergeError, StudyError
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.blocks import Round
from searchmerge.execution.deadline import Deadline
from searchmerge.execution.executor import Event, Failed, Finished, Lost, event_of
from searchmerge.execution.gradient import LossRequest, LossResult
from searchmerge.execution.ray.actor import Begun, Loaded, RayWorker
from searchmerge.execution.ray.cluster import (
    RaySettings,
    amounts,
    connect,
    count_room,
    place,
    short,
)
from searchmerge.execution.worker import RoundResult, Worker, is_device_fault
from searchmerge.plan import MergePlan

_logger = logging.getLogger(__name__)

MAX_LOAD_DEATHS = 3
_TEND_S = 5.0  # how often the pool is compared with the cluster
_QUIET_S = 60.0  # how long nothing may be ready before a line says so
_PASSED_ON = (
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "TOKENIZERS_PARALLELISM",
    "TQDM_DISABLE",
    "HF_DATASETS_DISABLE_PROGRESS_BARS",
)


@dataclass(slots=True, eq=False)
class Slot:
    """One actor of the pool.

    Attributes:
        actor: Ray's handle.
        call: What is waited for: the end of loading, or a job's stream; ``None`` when idle.
        since: When it was last heard from, or asked for something.
        node: Where it runs; empty until it has loaded.
        job: What it works on.
        has_begun: Whether it took that job up.
    """

    actor: Any
    call: Any
    since: float
    node: str = ""
    job: int | None = None
    has_begun: bool = False

    @property
    def is_free(self) -> bool:
        """Whether nothing is waited for."""
        return self.call is None


class RayExecutor:
    """Runs jobs on a pool of Ray actors; a dead one is replaced, a hung one is killed.

    A worker that dies or hangs at a job ends it with ``Lost``. Workers that die as they load are
    replaced after a pause; after ``MAX_LOAD_DEATHS`` in a row the pool makes do with one fewer,
    and when none is left the study stops.

    Args:
        make_worker: Loads a worker, in the actor's process; it must be picklable.
        settings: Where the workers are, and what each of them needs.

    Raises:
        StudyError: If Ray cannot be reached, or has no room for a single worker.
    """

    def __init__(self, make_worker: Callable[[], Worker], settings: RaySettings) -> None:
        self._make_worker = make_worker
        self._settings = settings
        self._deadline = Deadline(settings.deadline_s)
        self._actor_class: Any = ray.remote(
            num_cpus=settings.cpus,
            num_gpus=settings.gpus,
            max_restarts=0,  # a restart is seen a second later, and as two errors
            scheduling_strategy="SPREAD",
        )(RayWorker)
        self._slots: list[Slot] = []
        self._ready: deque[tuple[Slot, Any]] = deque()
        self._tasks: dict[str, TaskInfo] | None = None
        self._load_deaths = 0
        self._spared = 0  # workers that the pool makes do without
        self._not_before = 0.0
        self._tended = -_TEND_S
        self._heard = time.monotonic()
        self._owns_ray = connect(settings.address)
        try:
            self._check_room()
            self._tend()
        except BaseException:
            self.close()
            raise

    def tasks(self) -> Mapping[str, TaskInfo]:
        """Return what the search must know of each task, once a worker is ready.

        Raises:
            SearchMergeError: If no worker can be loaded.
        """
        while self._tasks is None:
            self.next_event(_TEND_S)
        return self._tasks

    @property
    def n_free(self) -> int:
        """How many workers are ready and have no job."""
        return sum(slot.is_free for slot in self._slots)

    def submit(self, job: int, plan: MergePlan, rounds: Sequence[Round]) -> None:
        """Start a job on a free worker."""
        slot = self._free_slot(job)
        slot.call = slot.actor.score.options(num_returns="streaming").remote(plan, tuple(rounds))

    def submit_gradient(self, job: int, plan: MergePlan, request: LossRequest) -> None:
        """Start a job on a free worker that computes losses and their gradient."""
        slot = self._free_slot(job)
        slot.call = slot.actor.gradient.options(num_returns="streaming").remote(plan, request)

    def _free_slot(self, job: int) -> Slot:
        """Return a free worker, which has the job from now on."""
        slot = next((slot for slot in self._slots if slot.is_free), None)
        if slot is None:
            raise RuntimeError(f"job {job} was submitted while no worker is free")
        slot.job, slot.has_begun, slot.since = job, False, time.monotonic()
        return slot

    def stop(self, job: int) -> None:
        """Give up a job; its worker is free, and begins the next job after the current round."""
        for slot in self._slots:
            if slot.job == job:
                ray.cancel(slot.call)
                slot.job = slot.call = None

    def next_event(self, timeout_s: float) -> Event | None:
        """Wait for the next event.

        Raises:
            SearchMergeError: If a worker cannot be loaded, or a job ends with an error that is
                not its candidate's.
        """
        until = time.monotonic() + timeout_s
        while True:
            self._tend()
            if (late := self._kill_late()) is not None:
                return late
            if self._ready or self._wait(until - time.monotonic()):
                slot, call = self._ready.popleft()
                if slot.call is not call:  # given up in the meantime
                    continue
                was_loading = slot.job is None
                event = self._advance(slot)
                if event is not None or was_loading:
                    return event
            elif time.monotonic() >= until:
                return None

    def close(self) -> None:
        """Kill all workers, and Ray with them where it was started here."""
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots.clear()
        self._ready.clear()
        if self._owns_ray:
            ray.shutdown()
            self._owns_ray = False

    def _wait(self, timeout_s: float) -> bool:
        """Wait until some slots have something to say; return whether there are any."""
        waiting = {slot.call: slot for slot in self._slots if slot.call is not None}
        timeout_s = max(0.0, min(timeout_s, _TEND_S))
        if not waiting:
            time.sleep(min(timeout_s, 0.1))
            return False
        if not ray.wait(list(waiting), num_returns=1, timeout=timeout_s, fetch_local=False)[0]:
            return False
        # all that are ready, so that none is served twice before another is served once
        calls = list(waiting)
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0, fetch_local=False)
        self._ready.extend((waiting[call], call) for call in ready)
        return bool(self._ready)

    def _advance(self, slot: Slot) -> Event | None:
        """Take what a slot has to say."""
        self._heard = slot.since = time.monotonic()
        if slot.job is None:
            self._finish_loading(slot)
            return None
        job = slot.job
        try:
            message = ray.get(next(slot.call))
        except StopIteration:
            slot.job = slot.call = None
            return Finished(job)
        except RayTaskError as error:
            slot.job = slot.call = None
            return _judge(job, error)
        except RayError as error:
            return self._lose(slot, *self._autopsy(slot, error))
        match message:
            case Begun():
                slot.has_begun = True
                return None
            case RoundResult() | LossResult():
                self._deadline.saw(message.seconds)
                return event_of(job, message)
        return self._lose(slot, str(message), blameless=False)

    def _finish_loading(self, slot: Slot) -> None:
        try:
            loaded: Loaded = ray.get(slot.call)
        except RayTaskError as error:
            if not is_device_fault(error.cause):
                _raise_load_error(error)
            ray.kill(slot.actor)  # another device may do
            self._lose_loading(slot, f"the device failed: {error.cause}", blameless=False)
            return
        except RayError as error:
            self._lose_loading(slot, *self._autopsy(slot, error))
            return
        slot.call, slot.node = None, loaded.node
        self._load_deaths = 0
        self._tasks = loaded.tasks

    def _lose_loading(self, slot: Slot, reason: str, blameless: bool) -> None:  # noqa: FBT001
        slot.call = None
        self._slots.remove(slot)
        _logger.warning("a worker was lost as it loaded: %s", reason)
        if blameless:
            return
        self._load_deaths += 1
        self._not_before = time.monotonic() + 2.0 ** (self._load_deaths - 1)
        if self._load_deaths < MAX_LOAD_DEATHS:
            return
        self._load_deaths = 0
        self._spared += 1
        if not self._slots:
            raise StudyError(f"{MAX_LOAD_DEATHS} workers died as they loaded; the last: {reason}")
        _logger.warning("going on with %d workers", len(self._slots))

    def _lose(self, slot: Slot, reason: str, blameless: bool) -> Lost | None:  # noqa: FBT001
        job, slot.call = slot.job, None
        self._slots.remove(slot)
        ray.kill(slot.actor)
        return None if job is None else Lost(job, reason, blameless, slot.has_begun)

    def _autopsy(self, slot: Slot, error: RayError) -> tuple[str, bool]:
        """Return what a worker died of, and whether the job cannot have caused it.

        Raises:
            StudyError: If Ray itself died on the one machine there is.
        """
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if not alive and self._settings.address == "local":
            raise StudyError("Ray died on this machine; the same command starts it again")
        if (isinstance(error, ActorDiedError) and error.preempted) or (
            slot.node and slot.node not in alive
        ):
            return "its node was taken away", True
        if isinstance(error, ActorUnavailableError):  # Ray hears of a dead process within a second
            return "its node cannot be reached", True
        return f"the worker died: {short(error)}", slot.job is not None and not slot.has_begun

    def _kill_late(self) -> Lost | None:
        """Kill a worker that is past its deadline, however busy the others are."""
        latest = time.monotonic() - self._deadline.seconds
        for slot in self._slots:
            if slot.job is None or slot.since >= latest:
                continue
            if ray.wait([slot.call], timeout=0, fetch_local=False)[0]:
                continue  # it has something to say; it was this process that was late
            reason = f"no round within {self._deadline}"
            return self._lose(slot, reason, blameless=not slot.has_begun)
        return None

    def _tend(self) -> None:
        """Start workers that are missing, and say so where nothing is ready for long."""
        now = time.monotonic()
        n_wanted = self._n_wanted(now)
        while len(self._slots) < n_wanted and now >= self._not_before:
            environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
            actor = self._actor_class.remote(environment)
            self._slots.append(Slot(actor, actor.load.remote(self._make_worker), now))
        if any(slot.node for slot in self._slots):
            self._heard = max(self._heard, now - _QUIET_S)
        elif now - self._heard > _QUIET_S:
            self._heard = now
            _logger.warning(
                "no worker is ready yet: %d are asked for, each with %s; the cluster has %s free",
                len(self._slots),
                self._needs(),
                amounts(ray.available_resources()),
            )

    def _n_wanted(self, now: float) -> int:
        if self._settings.workers is not None:
            return self._settings.workers - self._spared
        if now - self._tended >= _TEND_S:
            self._tended, self._room = now, count_room(self._settings)
        return max(1, self._room - self._spared)

    def _check_room(self) -> None:
        room = count_room(self._settings)
        wanted = self._settings.workers or 1
        if room >= wanted:
            return
        shortage = (
            f"{wanted} workers of {self._needs()} each were asked for; "
            f"{place(self._settings.address)} has {amounts(ray.cluster_resources())}, "
            f"room for {room}"
        )
        if room == 0 or self._settings.address == "local":
            raise StudyError(
                f"{shortage}; lower ray.workers, ray.cpus_per_worker or ray.gpus_per_worker"
            )
        _logger.warning("%s; the others start when nodes join", shortage)

    def _needs(self) -> str:
        return amounts({"CPU": self._settings.cpus, "GPU": self._settings.gpus})


def _judge(job: int, error: RayTaskError) -> Failed:
    """Return that the candidate failed; raise what is not the candidate's fault."""
    cause = error.cause
    if isinstance(cause, EvaluationError):
        return Failed(job, str(cause))
    if isinstance(cause, SearchMergeError):
        raise cause from error
    raise StudyError(f"a worker failed; its traceback:\n{error}") from error


def _raise_load_error(error: RayTaskError) -> None:
    cause = error.cause
    if isinstance(cause, SearchMergeError):
        raise cause from error
    raise StudyError(f"a worker cannot be loaded; its traceback:\n{error}") from error
