"""Workers on a Ray cluster: a pool of actors, each with one resident model."""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from searchmerge.errors import DeviceFault, EvaluationError, SearchMergeError, StudyError
from searchmerge.evaluators.blocks import Round
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.deadline import Deadline
from searchmerge.execution.executor import Event, Failed, Finished, Lost, Scored
from searchmerge.execution.worker import RoundResult, Worker, is_device_fault
from searchmerge.plan import MergePlan

# Ray reads these when it is imported: no usage report, no raylet messages between our lines
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    RayError,
    RaySystemError,
    RayTaskError,
)

_logger = logging.getLogger(__name__)

MAX_LOAD_DEATHS = 3
_TEND_S = 5.0  # how often the pool is compared with the cluster
_QUIET_S = 60.0  # how long nothing may be ready before a line says so
_STORE_BYTES = 128 * 2**20  # only plans and scores go through the object store
_REPORT_S = 0.005  # what a dying process needs to send off its last report: 1 ms, measured
_PASSED_ON = (
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "TOKENIZERS_PARALLELISM",
    "TQDM_DISABLE",
    "HF_DATASETS_DISABLE_PROGRESS_BARS",
)


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


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a worker says once it can work."""

    tasks: dict[str, TaskInfo]
    node: str


@dataclass(frozen=True, slots=True)
class _Begun:
    """A worker took up a job: from here on, its death may be the plan's doing."""


class _RayWorker:
    """A worker in a process of its own. Ray keeps it until it is killed."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        self._worker: Worker | None = None

    def load(self, make_worker: Callable[[], Worker]) -> _Loaded:
        """Load the model, which takes as long as it takes."""
        self._worker = make_worker()
        return _Loaded(dict(self._worker.tasks()), ray.get_runtime_context().get_node_id())

    def score(
        self, plan: MergePlan, rounds: Sequence[Round]
    ) -> Iterator[_Begun | RoundResult | DeviceFault]:
        """Yield that the job is taken up, then each round's scores, or a fault at last."""
        if self._worker is None:
            raise RuntimeError("a job was given to a worker that has loaded no model")
        yield _Begun()
        time.sleep(_REPORT_S)
        try:
            yield from self._worker.score(plan, rounds)
        except DeviceFault as fault:
            yield fault


@dataclass(slots=True, eq=False)
class _Slot:
    """One actor of the pool.

    Attributes:
        actor: Ray's handle.
        call: What is waited for: the end of loading, or a job's stream; ``None`` when idle.
        since: When something was last heard of it, or asked of it.
        node: Where it runs; empty until it has loaded.
        job: What it works at.
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
        return self.call is None


class RayExecutor:
    """Runs jobs on a pool of Ray actors; a dead one is replaced, a hung one is killed.

    A worker that dies or hangs at a job ends it with ``Lost``. Workers that die as they load are
    replaced after a pause; after ``MAX_LOAD_DEATHS`` in a row the pool does with one fewer, and
    where none is left the study stops.

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
        )(_RayWorker)
        self._slots: list[_Slot] = []
        self._ready: deque[tuple[_Slot, Any]] = deque()
        self._tasks: dict[str, TaskInfo] | None = None
        self._load_deaths = 0
        self._spared = 0  # workers that the pool does without
        self._not_before = 0.0
        self._tended = -_TEND_S
        self._heard = time.monotonic()
        self._owns_ray = _connect(settings.address)
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
        slot = next((slot for slot in self._slots if slot.is_free), None)
        if slot is None:
            raise RuntimeError(f"job {job} was submitted while no worker is free")
        slot.job, slot.has_begun, slot.since = job, False, time.monotonic()
        method = slot.actor.score.options(num_returns="streaming")
        slot.call = method.remote(plan, tuple(rounds))

    def stop(self, job: int) -> None:
        """Give up a job; its worker is free, and begins the next one after the present round."""
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

    def _advance(self, slot: _Slot) -> Event | None:
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
            case _Begun():
                slot.has_begun = True
                return None
            case RoundResult():
                self._deadline.saw(message.merge_s + message.score_s)
                return Scored(job, message)
        return self._lose(slot, str(message), blameless=False)

    def _finish_loading(self, slot: _Slot) -> None:
        try:
            loaded: _Loaded = ray.get(slot.call)
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

    def _lose_loading(self, slot: _Slot, reason: str, blameless: bool) -> None:  # noqa: FBT001
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

    def _lose(self, slot: _Slot, reason: str, blameless: bool) -> Lost | None:  # noqa: FBT001
        job, slot.call = slot.job, None
        self._slots.remove(slot)
        ray.kill(slot.actor)
        return None if job is None else Lost(job, reason, blameless, slot.has_begun)

    def _autopsy(self, slot: _Slot, error: RayError) -> tuple[str, bool]:
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
        return f"the worker died: {_short(error)}", slot.job is not None and not slot.has_begun

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
            self._slots.append(_Slot(actor, actor.load.remote(self._make_worker), now))
        if any(slot.node for slot in self._slots):
            self._heard = max(self._heard, now - _QUIET_S)
        elif now - self._heard > _QUIET_S:
            self._heard = now
            _logger.warning(
                "no worker is ready yet: %d are asked for, each with %s; the cluster has %s free",
                len(self._slots),
                self._needs(),
                _amounts(ray.available_resources()),
            )

    def _n_wanted(self, now: float) -> int:
        if self._settings.workers is not None:
            return self._settings.workers - self._spared
        if now - self._tended >= _TEND_S:
            self._tended, self._room = now, _room(self._settings)
        return max(1, self._room - self._spared)

    def _check_room(self) -> None:
        room = _room(self._settings)
        wanted = self._settings.workers or 1
        if room >= wanted:
            return
        found = (
            f"{wanted} workers of {self._needs()} each were asked for; "
            f"{_place(self._settings.address)} has {_amounts(ray.cluster_resources())}, "
            f"room for {room}"
        )
        if room == 0 or self._settings.address == "local":
            raise StudyError(
                f"{found}; lower ray.workers, ray.cpus_per_worker or ray.gpus_per_worker"
            )
        _logger.warning("%s; the others start when nodes join", found)

    def _needs(self) -> str:
        return _amounts({"CPU": self._settings.cpus, "GPU": self._settings.gpus})


def _connect(address: str) -> bool:
    """Start Ray or join a cluster, unless this process did so already; return whether it did now.

    Raises:
        StudyError: If there is no cluster at ``address``.
    """
    if ray.is_initialized():
        return False
    if address not in ("local", "auto"):
        _check_reachable(address)
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
        raise StudyError(f"ray.address {address}: {_short(error)}") from error
    except BaseException:
        ray.shutdown()
        raise
    return True


def _check_reachable(address: str) -> None:
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
    """Hold back the first SIGINT or SIGTERM: Ray swallows one, and ends the process at the other.

    Ray also leaves a SIGTERM handler of its own behind, which is undone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    held: list[int] = []

    def restore() -> None:
        for one, handler in before.items():
            signal.signal(one, handler)

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


def _room(settings: RaySettings) -> int:
    """Return how many workers fit on the nodes there are, if nothing else runs on them."""
    return sum(
        min(
            int(resources.get(name, 0.0) / need + 1e-9)
            for name, need in (("CPU", settings.cpus), ("GPU", settings.gpus))
            if need
        )
        for resources in (node["Resources"] for node in ray.nodes() if node["Alive"])
    )


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


def _short(error: BaseException) -> str:
    """Return the line of Ray's message that says what happened, without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return last.partition(" Some common causes")[0][:300]


def _amounts(resources: Mapping[str, float]) -> str:
    named = {name: resources.get(name, 0.0) for name in ("CPU", "GPU")}
    return (
        " and ".join(f"{amount:g} {name}s" for name, amount in named.items() if amount) or "none"
    )


def _place(address: str) -> str:
    return "this machine" if address == "local" else f"the cluster ({address})"
