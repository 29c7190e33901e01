"""The executor that runs jobs on a pool of Ray actors, each with one resident model."""

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
from searchmerge.execution.deadline import Deadlines, Work
from searchmerge.execution.executor import (
    Event,
    Failed,
    Finished,
    Lost,
    WorkerState,
    event_of,
)
from searchmerge.execution.gradient import LossRequest, LossResult
from searchmerge.execution.ray.actor import Begun, Loaded, Placed, RayWorker
from searchmerge.execution.ray.cluster import (
    Head,
    RaySettings,
    amounts,
    connect,
    place,
    short,
)
from searchmerge.execution.ray.nodes import MAX_LOAD_DEATHS, Nodes
from searchmerge.execution.worker import RoundResult, Tuning, Worker, is_device_fault
from searchmerge.plan import MergePlan

_logger = logging.getLogger(__name__)

_TEND_S = 5.0  # how often the pool is compared with the cluster
_QUIET_S = 60.0  # how long nothing may be ready before a line says so
_LONGEST_PAUSE_S = 60.0  # after a worker that died as it loaded
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


class RayExecutor:
    """Runs jobs on a pool of Ray actors; a dead one is replaced, a hung one is killed.

    A worker that dies or hangs at a job ends it with ``Lost``. Workers that die or hang as they
    load are replaced after a pause; after ``MAX_LOAD_DEATHS`` in a row on one node that node has
    to do with fewer, and when none can be anywhere the study stops. The same where a worker can
    not be loaded though another was, as a node may lack a file; before that it stops the study,
    as does the head of the cluster where it does not come back. A worker that does not even say
    where it is within the time that loading may take waits for room, or hangs: it is asked for
    anew.

    Args:
        make_worker: Loads a worker, in the actor's process; it must be picklable.
        settings: Where the workers are, and what each of them needs.

    Raises:
        StudyError: If Ray cannot be reached, or has no room for a single worker.
    """

    def __init__(self, make_worker: Callable[[], Worker], settings: RaySettings) -> None:
        self._make_worker = make_worker
        self._settings = settings
        self._deadlines = Deadlines(settings.deadline_s)
        self._actor_class: Any = ray.remote(
            num_cpus=settings.cpus,
            num_gpus=settings.gpus,
            max_restarts=0,  # a restart is seen a second later, and as two errors
            scheduling_strategy="SPREAD",
        )(RayWorker)
        self._slots: list[Slot] = []
        self._ready: deque[tuple[Slot, Any]] = deque()
        self._tasks: dict[str, TaskInfo] | None = None
        self._tuning: Tuning = {}
        self._n_asked = 0
        self._not_before = 0.0
        self._tended = -_TEND_S
        self._is_up = True
        self._heard = time.monotonic()
        self._nodes = Nodes(settings)
        self._owns_ray = connect(settings.address)
        self._head = Head(ray.get_runtime_context().gcs_address, place(settings.address))
        try:
            self._nodes.update(ray.nodes())
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

    def workers(self) -> list[WorkerState]:
        """Return each worker as it is now, those that still wait for room or load included."""
        return [
            WorkerState(slot.name, slot.host, slot.device, slot.doing, slot.job)
            for slot in self._slots
        ]

    def tune(self, blocks: Round) -> Tuning:
        """Return how each task is scored soonest, as the first worker measures it.

        Nothing where that worker dies at it, or takes too long.

        Raises:
            SearchMergeError: If no worker can be loaded.
        """
        self.tasks()
        while not (free := [slot for slot in self._slots if slot.is_free]):
            self.next_event(_TEND_S)
        slot = free[0]
        try:
            seconds = self._deadlines.at(slot.node).seconds
            tuning: Tuning = ray.get(slot.actor.tune.remote(blocks), timeout=seconds)
        except RayError as error:
            told = "%s could not measure how scoring is fastest; the usual way is taken: %s"
            _logger.warning(told, slot.at, short(error))
            self._drop(slot)
            return {}
        return tuning

    def use(self, tuning: Tuning) -> None:
        """Let every worker score each task so from its next job on."""
        self._tuning = tuning

    def submit(self, job: int, plan: MergePlan, rounds: Sequence[Round]) -> None:
        """Start a job on a free worker."""
        slot = self._free_slot(job)
        slot.call = slot.actor.score.options(num_returns="streaming").remote(
            plan, tuple(rounds), self._tuning
        )

    def submit_gradient(self, job: int, plan: MergePlan, request: LossRequest) -> None:
        """Start a job on a free worker that computes losses and their gradient."""
        slot = self._free_slot(job, "gradient")
        slot.call = slot.actor.gradient.options(num_returns="streaming").remote(plan, request)

    def _free_slot(self, job: int, work: Work = "round") -> Slot:
        """Return a free worker, which has the job from now on."""
        slot = next((slot for slot in self._slots if slot.is_free), None)
        if slot is None:
            raise RuntimeError(f"job {job} was submitted while no worker is free")
        slot.job, slot.has_begun, slot.since = job, False, time.monotonic()
        slot.work = work
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
                if event is not None or (was_loading and slot.is_free):
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
            self._go_on_loading(slot)
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
                self._deadlines.at(slot.node, slot.work).saw(message.seconds)
                return event_of(job, message)
        return self._lose(slot, str(message), blameless=False)

    def _go_on_loading(self, slot: Slot) -> None:
        """Take what a slot says as it loads: where it is, and that it has loaded."""
        try:
            message = ray.get(next(slot.call))
        except RayTaskError as error:
            is_fault = is_device_fault(error.cause)  # another device may do
            if self._tasks is None and not is_fault:
                _raise_load_error(error)
            failed = "the device failed" if is_fault else "it cannot be loaded there"
            self._lose_loading(slot, f"{failed}: {short(error.cause)}", blameless=False)
            return
        except RayError as error:
            self._lose_loading(slot, *self._autopsy(slot, error))
            return
        match message:
            case Placed(node, host):
                slot.node, slot.host = node, host
            case Loaded(tasks, device):
                slot.call, slot.device, self._tasks = None, device, tasks
                self._nodes.loaded(slot.node)

    def _lose_loading(self, slot: Slot, reason: str, blameless: bool) -> None:  # noqa: FBT001
        self._drop(slot)
        _logger.warning("%s was lost as it loaded: %s", slot.at, reason)
        if blameless:
            return
        n_died = self._nodes.died_loading(slot.node, self._n_at()[slot.node])
        pause = min(2.0 ** (n_died - 1), _LONGEST_PAUSE_S)
        self._not_before = time.monotonic() + pause
        is_hopeless = n_died >= MAX_LOAD_DEATHS and not (slot.node and self._nodes.room)
        if is_hopeless and not any(other.node for other in self._slots):
            told = f"{n_died} workers died as they loaded; the last: {slot.at}: {reason}"
            raise StudyError(told)

    def _n_at(self) -> Counter[str]:
        """Return how many workers each node has."""
        return Counter(slot.node for slot in self._slots if slot.node)

    def _lose(self, slot: Slot, reason: str, blameless: bool) -> Lost | None:  # noqa: FBT001
        job = slot.job
        self._drop(slot)
        if job is None:
            return None
        return Lost(job, f"{slot.at}: {reason}", blameless, slot.has_begun)

    def _drop(self, slot: Slot) -> None:
        """Make sure that a worker is dead, and let its place be taken."""
        slot.call = None
        self._slots.remove(slot)
        ray.kill(slot.actor)

    def _autopsy(self, slot: Slot, error: RayError) -> tuple[str, bool]:
        """Return what a worker died of, and whether the job cannot have caused it.

        Raises:
            StudyError: If Ray itself died on the one machine there is.
        """
        if not self._head.answers():
            return "the head of the cluster cannot be reached", True
        self._nodes.update(ray.nodes())
        if not self._nodes and self._settings.address == "local":
            raise StudyError("Ray died on this machine; the same command starts it again")
        if (isinstance(error, ActorDiedError) and error.preempted) or (
            slot.node and slot.node not in self._nodes
        ):
            return "its node was taken away", True
        if isinstance(error, ActorUnavailableError):  # Ray hears of a dead process within a second
            return "its node cannot be reached", True
        return f"the worker died: {short(error)}", slot.job is not None and not slot.has_begun

    def _kill_late(self) -> Lost | None:
        """Kill a worker that is past its deadline, however busy the others are."""
        now = time.monotonic()
        for slot in list(self._slots):
            if slot.doing == "idle" or now - slot.since <= self._allowed_s(slot):
                continue
            if ray.wait([slot.call], timeout=0, fetch_local=False)[0]:
                continue  # it has something to say; it was this process that was late
            if slot.doing == "working":
                deadline = self._deadlines.at(slot.node, slot.work)
                reason = f"no {slot.work} within {deadline}"
                return self._lose(slot, reason, blameless=not slot.has_begun)
            allowed = f"{self._settings.loading_s:g} s; ray.loading_deadline of the config"
            if slot.doing == "waiting":  # for room, for all that is known: it costs nothing
                self._drop(slot)
                told = "%s has not begun to load within %s: another is asked for in its place"
                _logger.warning(told, slot.name, allowed)
                continue
            self._lose_loading(slot, f"not loaded within {allowed}", blameless=False)
        return None

    def _allowed_s(self, slot: Slot) -> float:
        """Return how long a worker may be silent at what it is doing."""
        if slot.doing == "working":
            return self._deadlines.at(slot.node, slot.work).seconds
        return self._settings.loading_s

    def _tend(self) -> None:
        """Start workers that are missing, and say so where nothing is ready for long."""
        now = time.monotonic()
        if now - self._tended >= (_TEND_S if self._is_up else _TEND_S / 5):
            self._tended, self._is_up = now, self._head.answers()
            if self._is_up:
                self._nodes.update(ray.nodes())
        if not self._is_up:
            return
        while len(self._slots) < self._n_wanted() and now >= self._not_before:
            if not self._head.answers():
                return
            self._ask_for_worker(now)
        if any(slot.device for slot in self._slots):
            self._heard = max(self._heard, now - _QUIET_S)
        elif now - self._heard > _QUIET_S:
            self._heard = now
            _logger.warning(
                "no worker is ready yet: %d are asked for, each with %s; the cluster has %s free",
                len(self._slots),
                self._settings.needs,
                amounts(ray.available_resources()),
            )

    def _ask_for_worker(self, now: float) -> None:
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        options: dict[str, Any] = {}
        if full := self._nodes.full(self._n_at()):
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(full)})"}
        actor = self._actor_class.options(**options).remote(environment)
        loading = actor.load.options(num_returns="streaming").remote(self._make_worker)
        self._n_asked += 1
        self._slots.append(Slot(self._n_asked, actor, loading, now))

    def _n_wanted(self) -> int:
        return self._settings.workers or max(1, self._nodes.room)

    def _check_room(self) -> None:
        room = self._nodes.room
        wanted = self._settings.workers or 1
        if room >= wanted:
            return
        shortage = (
            f"{wanted} workers of {self._settings.needs} each were asked for; "
            f"{place(self._settings.address)} has {amounts(ray.cluster_resources())}, "
            f"room for {room}"
        )
        if room == 0 or self._settings.address == "local":
            raise StudyError(
                f"{shortage}; lower ray.workers, ray.cpus_per_worker or ray.gpus_per_worker"
            )
        _logger.warning("%s; the others start when nodes join", shortage)


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
