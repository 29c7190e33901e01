"""The executor that runs jobs on a pool of Ray actors, each with one resident model."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

import ray
import torch
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    RayError,
    RayTaskError,
)

from searchmerge.errors import EvaluationError, SearchMergeError, StudyError, WorkerError
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.blocks import Round
from searchmerge.execution.deadline import Deadlines, Work
from searchmerge.execution.executor import (
    Event,
    Failed,
    Finished,
    Lost,
    WorkerState,
    Write,
    event_of,
)
from searchmerge.execution.gradient import LossRequest, LossResult
from searchmerge.execution.ray.actor import Begun, Loaded, Placed
from searchmerge.execution.ray.cluster import (
    Head,
    RaySettings,
    amounts,
    connect,
    place,
    short,
)
from searchmerge.execution.ray.nodes import MAX_LOAD_DEATHS, Nodes
from searchmerge.execution.ray.slots import Slot, Slots
from searchmerge.execution.ray.weights import weights_of
from searchmerge.execution.worker import RoundResult, Tuning, Worker, is_device_fault
from searchmerge.plan import MergePlan

_logger = logging.getLogger(__name__)

_TEND_S = 5.0  # how often the pool is compared with the cluster
_QUIET_S = 60.0  # how long nothing may be ready before a line says so
_LONGEST_PAUSE_S = 60.0  # after a worker that died as it loaded
_MORE_TRIES = 2  # at merging a whole model, with workers in the place of those that were lost


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
        self._settings = settings
        self._deadlines = Deadlines(settings.deadline_s)
        self._tasks: dict[str, TaskInfo] | None = None
        self._tuning: Tuning = {}
        self._measured: Tuning = {}
        self._not_before = 0.0
        self._tended = -_TEND_S
        self._is_up = True
        self._heard = time.monotonic()
        self._nodes = Nodes(settings)
        self._slots = Slots(make_worker, settings)
        self._owns_ray = connect(settings.address)
        self._head = Head(ray.get_runtime_context().gcs_address, place(settings.address))
        try:
            self._nodes.update(ray.nodes())
            self._nodes.check_room()
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
        slot, self._measured = self._soon_free(), {}
        slot.call = slot.actor.tune.options(num_returns="streaming").remote(blocks)
        slot.since = time.monotonic()
        while not slot.is_free:
            self.next_event(_TEND_S)
        return self._measured

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

    def write_merged(self, plan: MergePlan, dtype: torch.dtype, write: Write) -> None:
        """Have one worker after another merge a whole model, until one has.

        Each that fails is killed, and what takes its place may be asked too, but no more workers
        than there are now and ``_MORE_TRIES``. One that loads is waited for.
        """
        n_tries, allowed_s = len(self._slots) + _MORE_TRIES, self._settings.loading_s
        for _ in range(n_tries):
            try:
                slot = self._soon_free(allowed_s)
            except StudyError as error:
                if not self._head.answers():  # without it this process has not long to live
                    raise
                raise WorkerError(str(error)) from error
            try:
                write(weights_of(slot.actor, plan, dtype, allowed_s))
            except WorkerError as error:
                self._slots.drop(slot)  # or it would merge beside whoever does so in its place
                _logger.warning("%s did not merge the model: %s", slot.at, error)
            else:
                return
        raise WorkerError(f"{n_tries} workers in a row did not merge it")

    def _soon_free(self, within_s: float = math.inf) -> Slot:
        """Return a free worker; wait for one where there is none.

        Raises:
            WorkerError: If there is none within ``within_s``, and none that loads.
            SearchMergeError: If no worker can be loaded.
        """
        until = time.monotonic() + within_s
        while (slot := next((slot for slot in self._slots if slot.is_free), None)) is None:
            if time.monotonic() > until and all(s.doing != "loading" for s in self._slots):
                raise WorkerError(f"no worker was free within {within_s:g} s")
            self.next_event(_TEND_S)
        return slot

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
            timeout_s = max(0.0, min(until - time.monotonic(), _TEND_S))
            if (slot := self._slots.next_ready(timeout_s)) is not None:
                was_loading = slot.job is None
                event = self._advance(slot)
                if event is not None or (was_loading and slot.is_free):
                    return event
            elif time.monotonic() >= until:
                return None

    def close(self) -> None:
        """Kill all workers, and Ray with them where it was started here."""
        self._slots.drop_all()
        if self._owns_ray:
            ray.shutdown()
            self._owns_ray = False

    def _advance(self, slot: Slot) -> Event | None:
        """Take what a slot has to say."""
        self._heard = slot.since = time.monotonic()
        if slot.job is None:
            if slot.device:
                self._take_measured(slot)
            else:
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

    def _take_measured(self, slot: Slot) -> None:
        """Take how scoring is fastest, as a worker measured; one that failed is given up."""
        try:
            self._measured = ray.get(next(slot.call))
        except RayTaskError as error:
            self._lose(slot, short(error), blameless=False)
        except RayError as error:
            self._lose(slot, *self._autopsy(slot, error))
        slot.call = None

    def _go_on_loading(self, slot: Slot) -> None:
        """Take what a slot says as it loads: where it is, and that it has loaded."""
        try:
            message = ray.get(next(slot.call))
        except RayTaskError as error:
            is_fault = is_device_fault(error.cause)  # another device may do
            if self._tasks is None and not is_fault:
                raise _told(error, "a worker cannot be loaded") from error
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
        self._slots.drop(slot)
        _logger.warning("%s was lost as it loaded: %s", slot.at, reason)
        if blameless:
            return
        n_died = self._nodes.died_loading(slot.node, self._slots.n_at()[slot.node])
        pause = min(2.0 ** (n_died - 1), _LONGEST_PAUSE_S)
        self._not_before = time.monotonic() + pause
        is_hopeless = n_died >= MAX_LOAD_DEATHS and not (slot.node and self._nodes.room)
        if is_hopeless and not any(other.node for other in self._slots):
            told = f"{n_died} workers died as they loaded; the last: {slot.at}: {reason}"
            raise StudyError(told)

    def _lose(self, slot: Slot, reason: str, blameless: bool) -> Lost | None:  # noqa: FBT001
        job = slot.job
        self._slots.drop(slot)
        if job is None:  # it measured
            told = "%s could not measure how scoring is fastest; the usual way is taken: %s"
            _logger.warning(told, slot.at, reason)
            return None
        return Lost(job, f"{slot.at}: {reason}", blameless, slot.has_begun)

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
        for slot in self._slots:
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
                self._slots.drop(slot)
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
        while len(self._slots) < self._nodes.n_wanted and now >= self._not_before:
            if not self._head.answers():
                return
            self._slots.ask(self._nodes.full(self._slots.n_at()))
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


def _judge(job: int, error: RayTaskError) -> Failed:
    """Return that the candidate failed; raise what is not the candidate's fault."""
    if isinstance(error.cause, EvaluationError):
        return Failed(job, str(error.cause))
    raise _told(error, "a worker failed") from error


def _told(error: RayTaskError, what: str) -> SearchMergeError:
    """Return the error of a worker in its own words; one that is not ours with its traceback."""
    if isinstance(error.cause, SearchMergeError):
        return error.cause
    return StudyError(f"{what}; its traceback:\n{error}")
