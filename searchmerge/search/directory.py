"""A study's run directory: Optuna's storage, the score cache, and what guards them."""

import contextlib
import errno
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from searchmerge.errors import StudyError
from searchmerge.interrupts import held_back
from searchmerge.plan import MergePlan, SettingValue
from searchmerge.search.budget import KeptTime
from searchmerge.search.crashes import Crashes
from searchmerge.search.loss_store import LossStore
from searchmerge.search.mirrored_storage import mirrored
from searchmerge.search.references import expert_name
from searchmerge.search.scores import ScoreStore
from searchmerge.search.storage import (
    claim_study,
    close_storage,
    find_study,
    open_storage,
    prepare_storage,
    readable,
    storage_errors,
)
from searchmerge.search.trials import (
    FINISHED,
    CompletedScores,
    TrialRecord,
    enqueue,
    enqueue_failed,
    enqueue_refined,
    is_refined,
    left_running,
    next_due,
    refines_of,
    refining_of,
    repeats_of,
    standing_trials,
)
from searchmerge.search.within_space import WithinSpace

SCORES_FILE = "scores.db"
PLANS_DIR = "plans"
BEST_SO_FAR = "best so far"
"""What the plan is called that is best while a study runs."""
_LOCK_FILE = ".lock"
_LOOK_S = 0.2  # for which :func:`is_held` tries: who looks too has the lock for a moment
_LOOKED_AT_S = 1.0  # for which a driver tries, longer than those have it
_UNSAFE = re.compile(r"[^\w+.-]")  # in the name of a file, which an expert's may not be
# user attributes of the study
_SPEC = "spec"  # the canonical study, as it was begun
_AT_WORK = "at_work"  # whether a run is at work, or was when it ended
_ELAPSED = "elapsed_s"
_DECIDING = "deciding"  # references that decide the blocks' order
_BEST = "best"  # what the plan is called that has the best evidence
_TUNING = "tuning"  # task to how it is scored
_MERGING = "merging"  # how merges were computed, one after the other
_REFINING_S = "refining_s"
_UNREFINED = "unrefined:"  # begins the name of a refinement that proposed nothing
_REFINING = "refining:"  # begins the name of how often runs ended abruptly during a refinement
_READ = "read:"  # begins the name of how a plan's scores were last read, once that was learnt
_COMPLETED = "completed:"  # begins the name of a trial's scores, scored in full after the search


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold ``run_dir`` for one driver.

    Raises:
        StudyError: If the directory cannot be made, or another driver holds it.
    """
    lock = FileLock(run_dir / _LOCK_FILE, timeout=_LOOKED_AT_S)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise StudyError(
            f"{run_dir}: another searchmerge is running this study; "
            "wait for it, stop it, or give this study another name"
        ) from error
    except OSError as error:
        raise StudyError(f"{run_dir}: cannot be used: {error.strerror or error}") from error
    try:
        yield
    except OSError as error:
        is_here = str(run_dir.resolve()) in str(Path(error.filename or ".").resolve())
        if not is_here and error.errno != errno.ENOSPC:
            raise
        raise StudyError(f"{run_dir}: cannot be used: {error.strerror or error}") from error
    finally:
        lock.release()


def is_held(run_dir: Path) -> bool | None:
    """Return whether a driver holds ``run_dir``, as far as this machine can tell.

    Where locks of another machine are not seen here, its drivers are not. Of a directory that
    cannot be written to nothing is known: ``None``.
    """
    file = run_dir / _LOCK_FILE
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=_LOOK_S, poll_interval=_LOOK_S / 20):
            return False
    except Timeout:
        return True
    except OSError:
        return None


class StudyDirectory:
    """The study and the scores of one run directory, open for writing.

    Args:
        run_dir: Where the files are, or are made.
        name: Name of the study.
        spec: The canonical study: all that may change a score. A study that was begun with
            another one is not gone on with.
        sampler: Given how many trials there are, makes what proposes parameters.
        directions: One per objective, each ``maximize``.
        storage: ``None`` for SQLite in ``run_dir``; ``journal:path`` for a journal file, from
            ``run_dir`` on; else a URL of Optuna's.

    Raises:
        StudyError: If the study was begun with another ``spec``, or a file cannot be written.
    """

    @held_back()
    def __init__(
        self,
        run_dir: Path,
        *,
        name: str,
        spec: Mapping[str, Any],
        sampler: Callable[[int], BaseSampler] | None = None,
        n_objectives: int = 1,
        storage: str | None = None,
    ) -> None:
        self.run_dir = run_dir
        quiet_optuna()
        with contextlib.ExitStack() as opened, storage_errors(run_dir, storage):
            is_new = not (run_dir / SCORES_FILE).exists()
            prepare_storage(run_dir, storage)
            stored = open_storage(run_dir, storage)
            opened.callback(close_storage, stored)
            study = optuna.create_study(
                storage=stored,
                study_name=name,
                directions=["maximize"] * n_objectives,
                load_if_exists=True,
            )
            claim_study(run_dir, storage, study)  # others' marks are in the database alone
            self._storage = mirrored(stored)
            self.study = optuna.load_study(study_name=name, storage=self._storage)
            if sampler is not None:
                n_before = sum(not is_refined(trial) for trial in self.trials())
                self.study.sampler = WithinSpace(sampler(n_before), self._storage)
            self._guard(spec)
            self.records()  # refuses those of an earlier version before anything is scored
            if is_new and self.trials(TrialState.COMPLETE):
                raise StudyError(
                    f"{run_dir}: the storage holds trials of study {name!r}, but {SCORES_FILE}, "
                    "with their scores, is not here; run it in the directory it was begun in, or "
                    "give the study another name"
                )
            self._was_cut_off = is_at_work(self.study)
            self.scores = ScoreStore(run_dir / SCORES_FILE)
            opened.callback(self.scores.close)
            self.losses = LossStore(run_dir / SCORES_FILE)
            opened.callback(self.losses.close)
            self.scores.claim(json.dumps(spec, sort_keys=True))
            self._check_scored()
            self._opened = opened.pop_all()

    def _guard(self, spec: Mapping[str, Any]) -> None:
        text = json.dumps(spec, sort_keys=True)
        begun_with = self.study.user_attrs.get(_SPEC)
        if begun_with is None:
            self._note(_SPEC, text)
        elif begun_with != text:
            where, was, now = _first_difference(json.loads(begun_with), json.loads(text))
            raise StudyError(
                f"{self.run_dir}: the study has changed since it was begun: {where} was {was!r} "
                f"and is now {now!r}; change it back, or give the study another name or run "
                "directory"
            )

    @held_back()
    def _note(self, key: str, value: object) -> None:
        """Keep an attribute of the study."""
        self.study.set_user_attr(key, value)

    def _check_scored(self) -> None:
        """Refuse a score cache that was lost, or replaced by an earlier one."""
        scored = self.scores.plans()
        for trial in self.trials(TrialState.COMPLETE):
            record = TrialRecord.read(trial)
            if record.plan.digest not in scored:
                raise StudyError(
                    f"{self.run_dir / SCORES_FILE}: has no scores of {record.name}, which is "
                    "complete; put back the file that belongs to the study, or begin it anew "
                    "under another name"
                )

    def keep_tuning(self, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return how tasks are scored in this study: as it was kept, or else is measured now.

        A study of which something was scored before that was measured goes on as it was begun.
        """
        kept: dict[str, Any] | None = self.study.user_attrs.get(_TUNING)
        if kept is None:
            kept = {} if self.scores.plans() else dict(measure())
            self._note(_TUNING, kept)
        return kept

    @property
    def ways_of_merging(self) -> list[str]:
        """In words how merges were computed, which decides how they are rounded; the last now."""
        return list(self.study.user_attrs.get(_MERGING, ()))

    def keep_way_of_merging(self, way: str) -> None:
        """Keep how merges are computed from here on."""
        if self.ways_of_merging[-1:] != [way]:
            self._note(_MERGING, [*self.ways_of_merging, way])

    @property
    def is_past_references(self) -> bool:
        """Whether a run has come to the end of the references, and more may be there."""
        return _DECIDING in self.study.user_attrs

    def keep_deciding(self, names: Sequence[str]) -> list[str]:
        """Return the references that decide the blocks' order: ``names``, or the first kept."""
        kept: list[str] | None = self.study.user_attrs.get(_DECIDING)
        if kept is None:
            self._note(_DECIDING, list(names))
            return list(names)
        return kept

    @property
    def searching(self) -> KeptTime:
        """The seconds that all runs of this study have searched."""
        return KeptTime(self.study, _ELAPSED)

    @property
    def refining(self) -> KeptTime:
        """The seconds that all runs of this study have refined plans and scored them."""
        return KeptTime(self.study, _REFINING_S)

    @property
    def is_begun(self) -> bool:
        """Whether a trial was begun, in this run or an earlier one."""
        return bool(self.trials(TrialState.RUNNING, *FINISHED))

    @property
    def was_cut_off(self) -> bool:
        """Whether the run before this one ended abruptly, by a kill or a power cut."""
        return self._was_cut_off

    def begin_run(self) -> None:
        """Note that a run is at work; only :meth:`end_run` takes it back."""
        self._note(_AT_WORK, value=True)

    def end_run(self) -> None:
        """Note that the run ended, by itself or stopped by a signal."""
        self._note(_AT_WORK, value=False)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the trials in these states, by number."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def records(self, *, as_told: bool = False) -> list[TrialRecord]:
        """Return what :func:`records_of` does.

        Args:
            as_told: Whether to return them as they were when they were told or completed, and
                not as they were last read.

        Raises:
            StudyError: If an earlier version of searchmerge wrote one.
        """
        return records_of(self.study, as_told=as_told)

    def write_plan(self, name: str, plan: MergePlan) -> None:
        """Write a plan into the run directory, under what it is called in tables.

        Raises:
            StudyError: If it cannot be written.
        """
        file = plan_file(self.run_dir, name)
        try:
            file.parent.mkdir(exist_ok=True)
            plan.to_yaml(file)
        except OSError as error:
            raise StudyError(f"{file}: cannot be written: {error.strerror or error}") from error

    def keep_best(self, name: str, plan: MergePlan) -> None:
        """Write the plan that is best while the study runs, and keep what it is called.

        Raises:
            StudyError: If it cannot be written.
        """
        self.write_plan(BEST_SO_FAR, plan)
        if self.study.user_attrs.get(_BEST) != name:
            self._note(_BEST, name)

    def keep_completed(self, record: TrialRecord) -> None:
        """Keep the scores of a trial that was stopped early and is scored in full since.

        Others of the same plan that were stopped are completed with it.
        """
        for other in self.records(as_told=True):
            is_twin = other.plan.digest == record.plan.digest and not other.refines
            is_stopped = other.value is not None and not other.is_full
            if other.number == record.number or (is_twin and is_stopped):
                self._note(f"{_COMPLETED}{other.number}", record.completed_scores())

    def keep_read(self, records: Iterable[TrialRecord]) -> None:
        """Keep how trials that were scored in full are read now, where that has changed."""
        before: dict[str, list[CompletedScores]] = defaultdict(list)
        for kept in self.records():
            before[kept.plan.digest].append(kept.completed_scores())
        for record in records:
            scores, known = record.completed_scores(), before[record.plan.digest]
            if not known or any(its != scores for its in known):
                self._note(f"{_READ}{record.plan.digest}", scores)

    @held_back()
    def enqueue_refined(self, name: str, plan: MergePlan, refining: Mapping[str, Any]) -> None:
        """Enqueue what a refinement proposes as a trial.

        Args:
            name: What the plan is called that was refined.
            plan: What came of it.
            refining: How; ``key`` tells the plan and the way of refining it from all others.
        """
        names = [refines_of(trial) for trial in self.trials() if repeats_of(trial) is None]
        n_before = sum(other == name or other.startswith(f"{name} (") for other in names)
        label = f"{name} ({n_before + 1})" if n_before else name
        enqueue_refined(self.study, label, plan, refining)

    def keep_unrefined(self, key: str, name: str) -> None:
        """Keep that the refinement of the plan called ``name`` proposed nothing."""
        self._note(f"{_UNREFINED}{key}", name)

    def refined_keys(self) -> set[str]:
        """Return the keys of the refinements that came to their end."""
        proposed = {refining_of(trial).get("key") for trial in self.trials() if is_refined(trial)}
        attributes = [k for k in self.study.user_attrs if k.startswith(_UNREFINED)]
        return {str(key) for key in proposed} | {k.removeprefix(_UNREFINED) for k in attributes}

    def count_refining(self, key: str) -> int:
        """Count that a refinement begins, or is taken up again.

        Returns:
            How many runs in a row ended abruptly during it, and were told nothing more.
        """
        attribute, n_answers = f"{_REFINING}{key}", self.losses.n_kept(key)
        before = self.study.user_attrs.get(attribute)
        crashes = Crashes(*before) if before is not None else Crashes(0, n_answers)
        if before is not None and self.was_cut_off:
            crashes = crashes.again(n_answers)
        self._note(attribute, crashes)
        return crashes.n

    def next_due(self) -> optuna.Trial | None:
        """Return the first trial that waits and is run whatever is left of the budget, begun."""
        return next_due(self.study, self._storage)

    def left_running(self) -> list[optuna.Trial]:
        """Return the trials that a stopped run left behind, to be taken up again."""
        return left_running(self.study, self._storage)

    @held_back()
    def enqueue(self, kind: str, params: Iterable[Mapping[str, SettingValue]]) -> None:
        """Let trials with these parameters be the next ones, but for those that were before."""
        for trial_params in params:
            enqueue(self.study, kind, trial_params)

    @held_back()
    def enqueue_failed(self) -> int:
        """Let all trials that failed be the next ones, each once; return how many there are."""
        return enqueue_failed(self.study)

    def close(self) -> None:
        """Close the score cache and the storage."""
        self._opened.close()


@contextlib.contextmanager
def stored_study(run_dir: Path, storage: str | None = None) -> Iterator[optuna.Study]:
    """Yield the study that was begun in ``run_dir``, to be read only.

    Args:
        run_dir: The study's run directory.
        storage: As in the config; needed only where it is a URL with a password.

    Raises:
        StudyError: If there is no study in ``run_dir``.
    """
    quiet_optuna()
    with readable(run_dir) as where:
        name, opened = find_study(where, storage)
        with storage_errors(run_dir, storage):
            try:
                yield optuna.load_study(study_name=name, storage=opened)
            finally:
                close_storage(opened)


def plan_file(run_dir: Path, name: str) -> Path:
    """Return where the plan is that is called ``name`` in tables: always a file of one folder.

    Experts may be called alike but for a space and a dash: of their names only the first space,
    which is not their own, becomes a dash.
    """
    n_dashes = 1 if name.startswith(expert_name("")) else -1
    safe = _UNSAFE.sub(lambda found: f"%{ord(found[0]):02X}", name.replace(" ", "-", n_dashes))
    return run_dir / PLANS_DIR / f"{safe}.yaml"


def records_of(study: optuna.Study, *, as_told: bool = False) -> list[TrialRecord]:
    """Return the records of a study's finished trials, by number.

    A failed trial is none of them once another one is to try it again.

    Args:
        study: The study.
        as_told: Whether to return them as they were when they were told or completed, and not
            as they were last read.

    Raises:
        StudyError: If an earlier version of searchmerge wrote one.
    """
    attributes = study.user_attrs
    told = [
        record.completed(attributes[f"{_COMPLETED}{record.number}"])
        if f"{_COMPLETED}{record.number}" in attributes
        else record
        for record in map(TrialRecord.read, standing_trials(study))
    ]
    if as_told:
        return told
    return [
        record.read_as(attributes[f"{_READ}{record.plan.digest}"])
        if record.is_full and f"{_READ}{record.plan.digest}" in attributes
        else record
        for record in told
    ]


def best_so_far_of(study: optuna.Study) -> str:
    """Return what the plan is called that is written as the best so far; empty if none is."""
    return str(study.user_attrs.get(_BEST, ""))


def is_at_work(study: optuna.Study) -> bool:
    """Return whether a run is at trials or refinements, or was when it ended abruptly."""
    return bool(study.user_attrs.get(_AT_WORK, False))


def elapsed_of(study: optuna.Study) -> float:
    """Return the seconds that all runs of a study have searched and refined."""
    return sum(KeptTime(study, attribute).elapsed_s for attribute in (_ELAPSED, _REFINING_S))


def quiet_optuna() -> None:
    """Let Optuna log through the root logger alone, and errors only."""
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def _first_difference(was: Any, now: Any, where: str = "") -> tuple[str, Any, Any]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            if was.get(key) != now.get(key):
                dotted = f"{where}.{key}" if where else str(key)
                return _first_difference(was.get(key), now.get(key), dotted)
    return where, was, now
