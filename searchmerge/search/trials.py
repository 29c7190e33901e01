"""What is kept of a trial, how trials are ranked, and how one is taken up again.

Optuna's attributes of trials are written and read here and nowhere else.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import reduce
from typing import Any, NamedTuple, Protocol, TypeVar

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from searchmerge.errors import StudyError
from searchmerge.plan import MergePlan, SettingValue
from searchmerge.search.crashes import Crashes
from searchmerge.search.objective import Objective

_PLAN = "plan"
_KIND = "kind"
_RESULT = "result"
_FAILURE = "failure"
_CUT_OFF = "cut_off"
_REFINES = "refines"
_REFINING = "refining"
_REPEATS = "repeats"

FINISHED = (TrialState.COMPLETE, TrialState.FAIL)

REFINED = "refined"
"""How the names of trials begin whose plans were refined."""


class Standing(NamedTuple):
    """What trials are ranked by, larger is better: constraints first, then the value.

    Attributes:
        kept: Minus the sum of what constraints are broken by; 0 where all are kept.
        value: The objective; of several what ``pick`` says.
    """

    kept: float
    value: float

    @classmethod
    def of(cls, violations: Iterable[float], value: float) -> "Standing":
        """Return the standing of a trial that breaks constraints by ``violations``."""
        return cls(-sum(max(0.0, violation) for violation in violations), value)


FAILED = Standing(float("-inf"), float("-inf"))


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """What is kept of a finished trial.

    Attributes:
        number: Optuna's number of the trial.
        plan: What it merged.
        kind: The reference or the warm start that it is; empty where a sampler proposed it.
        refines: What the plan is called that it was refined from, by gradient; empty where it
            was not. Such a trial has no parameters, as its plan is not in the space.
        repeats: The number of the failed trial that it tries again; ``None`` where it is none.
        scores: Task name to score; predicted ones where it was stopped early.
        estimates: Task name to what the score is taken for when trials are compared: with how
            clearly examples were answered, as far as that tells of the score.
        values: What Optuna was told: the value of each objective; none where it failed.
        value: The one value that it is ranked by; ``None`` where it failed.
        violations: Constraint name to by how much it is broken; 0 or less where it is kept.
        se: Standard error of the value, beside that of the best trial before it; ``None`` where
            that is not known.
        stopped_after: Blocks that it was scored on when it was stopped early, else ``None``.
        is_completed: Whether it was stopped early and scored in full after the search.
        merge_s: Seconds that workers merged.
        score_s: Seconds that workers scored.
        failure: Why it failed.
        datetime_complete: When it finished, as Optuna kept it; ``None`` where it was just told.
    """

    number: int
    plan: MergePlan
    kind: str = ""
    refines: str = ""
    repeats: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    estimates: Mapping[str, float] = field(default_factory=dict)
    values: tuple[float, ...] = ()
    value: float | None = None
    violations: Mapping[str, float] = field(default_factory=dict)
    se: float | None = None
    stopped_after: int | None = None
    is_completed: bool = False
    merge_s: float = 0.0
    score_s: float = 0.0
    failure: str = ""
    datetime_complete: datetime | None = None

    @classmethod
    def of(cls, trial: optuna.Trial, plan: MergePlan) -> "TrialRecord":
        """Return the record of a trial that is not told yet: its number, its plan, its kind."""
        kept = trial.user_attrs  # a copy each time
        kind, refines = str(kept.get(_KIND, "")), str(kept.get(_REFINES, ""))
        return cls(trial.number, plan, kind, refines, kept.get(_REPEATS))

    @property
    def name(self) -> str:
        """Return what it is called in tables."""
        return f"{REFINED} {self.refines}" if self.refines else f"trial {self.number}"

    @property
    def seconds(self) -> float:
        """Seconds that workers were at it."""
        return self.merge_s + self.score_s

    @property
    def is_full(self) -> bool:
        """Whether it was scored on every example."""
        return self.value is not None and (self.stopped_after is None or self.is_completed)

    @property
    def is_feasible(self) -> bool:
        """Whether it has a score and keeps every constraint."""
        return self.standing.kept == 0

    @property
    def standing(self) -> Standing:
        """Return what it is ranked by."""
        if self.value is None:
            return FAILED
        return Standing.of(self.violations.values(), self.value)

    def dominates(self, other: "TrialRecord") -> bool:
        """Return whether it is as good or better in every value, and better in one."""
        pairs = zip(self.values, other.values, strict=True)
        return self.values != other.values and all(mine >= theirs for mine, theirs in pairs)

    def judged(
        self,
        objective: Objective,
        scores: Mapping[str, float],
        estimates: Mapping[str, float] | None = None,
    ) -> "TrialRecord":
        """Return the record with these scores, and with what the objective makes of them.

        Args:
            objective: What trials are compared by.
            scores: Task name to score.
            estimates: What the scores are taken for; the scores themselves if ``None``.
        """
        estimates = dict(estimates or scores)
        return replace(
            self,
            scores=dict(scores),
            estimates=estimates,
            values=objective.values(estimates),
            value=objective.scalar(estimates),
            violations=objective.violations(scores),
        )

    def completed(self, scores: "CompletedScores") -> "TrialRecord":
        """Return the record of a trial that was stopped early, scored in full since."""
        return replace(self.read_as(scores), is_completed=True)

    def read_as(self, scores: "CompletedScores") -> "TrialRecord":
        """Return the record as it was read after it was told."""
        return replace(self, **{**scores, "values": tuple(scores["values"])})

    def completed_scores(self) -> "CompletedScores":
        """Return what :meth:`completed` and :meth:`read_as` take, as plain data."""
        return {
            "scores": dict(self.scores),
            "estimates": dict(self.estimates),
            "values": list(self.values),
            "value": self.value,
            "violations": dict(self.violations),
        }

    def write(self, trial: optuna.Trial) -> None:
        """Write all but the plan, which :func:`begin` wrote, onto the trial, before it is told."""
        if self.value is None:
            trial.set_user_attr(_FAILURE, self.failure)
            return
        result = {
            "scores": dict(self.scores),
            "estimates": dict(self.estimates),
            "value": self.value,
            "se": self.se,
            "stopped_after": self.stopped_after,
            "merge_s": round(self.merge_s, 4),
            "score_s": round(self.score_s, 4),
        }
        trial.set_user_attr(_RESULT, result)
        for name, violation in self.violations.items():
            trial.set_constraint(name, violation)

    @classmethod
    def read(cls, trial: FrozenTrial) -> "TrialRecord":
        """Return the record of a finished trial.

        Raises:
            StudyError: If an earlier version of searchmerge wrote it.
        """
        kept = trial.user_attrs
        plan = MergePlan.from_dict(kept[_PLAN])
        record = cls(
            trial.number,
            plan,
            str(kept.get(_KIND, "")),
            refines_of(trial),
            repeats_of(trial),
            datetime_complete=trial.datetime_complete,
        )
        if trial.state == TrialState.FAIL:
            return replace(record, failure=str(kept.get(_FAILURE, "")))
        result: dict[str, Any] = kept[_RESULT]
        if "estimates" not in result:
            raise StudyError(
                f"{record.name} was scored by an earlier version of searchmerge, whose records "
                "this one cannot read; run the study again, under another name or run directory"
            )
        return replace(
            record, values=tuple(trial.values), violations=dict(trial.constraints), **result
        )


CompletedScores = dict[str, Any]
"""Scores, estimates, values, value and violations of a record, by these names."""


# --- Ranking ------------------------------------------------------------------------------------


def best_of(records: Iterable[TrialRecord], n_best: int) -> list[TrialRecord]:
    """Return the best trials that have a score, best first, each plan once.

    Plans that break a constraint are left out where there is one that keeps them all. With
    several objectives those on the front come before the others.

    Args:
        records: What to rank; of equal ones the first stays first.
        n_best: How many to return, at most.
    """
    best: list[TrialRecord] = []
    seen: set[str] = set()
    for record in ranked(records):
        if record.plan.digest not in seen:
            seen.add(record.plan.digest)
            best.append(record)
    feasible = [record for record in best if record.is_feasible]
    return (feasible or best)[:n_best]


def ranked(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the trials that have a score, best first."""
    scored = [record for record in records if record.value is not None]
    front = {record.number for record in front_of(scored)}
    return sorted(scored, key=lambda r: (r.number in front, r.standing), reverse=True)


def front_of(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return those that keep all constraints and that no other such trial dominates.

    With one objective there is no front, and none is returned.
    """
    empty: list[TrialRecord] = []
    return reduce(front_with, records, empty)


def front_with(front: Sequence[TrialRecord], record: TrialRecord) -> list[TrialRecord]:
    """Return the front after one more trial."""
    is_out = len(record.values) < 2 or not record.is_feasible
    if is_out or any(other.dominates(record) for other in front):
        return list(front)
    return [*(other for other in front if not record.dominates(other)), record]


def standing_of(trial: FrozenTrial) -> Standing:
    """Return what a finished trial of one objective is ranked by; a failed one comes last."""
    if trial.state == TrialState.FAIL or not trial.values:
        return FAILED
    return Standing.of(trial.constraints.values(), trial.values[0])


def error_of(trial: FrozenTrial) -> float | None:
    """Return the standard error of a finished trial's value, where it is known."""
    result: Mapping[str, Any] = trial.user_attrs.get(_RESULT, {})
    error: float | None = result.get("se")
    return error


class Finished(Protocol):
    """A trial that is finished, or its record."""

    @property
    def number(self) -> int:
        """Optuna's number of the trial."""
        ...

    @property
    def datetime_complete(self) -> datetime | None:
        """When it finished."""
        ...


FinishedT = TypeVar("FinishedT", bound=Finished)


def by_completion(trials: Iterable[FinishedT]) -> list[FinishedT]:
    """Return trials, or their records, in the order in which they finished."""
    return sorted(trials, key=lambda t: (t.datetime_complete or datetime.max, t.number))


# --- Running trials -----------------------------------------------------------------------------


def enqueue(study: optuna.Study, kind: str, params: Mapping[str, SettingValue]) -> None:
    """Let a trial with these parameters be the next one, unless there was one before."""
    study.enqueue_trial(dict(params), user_attrs={_KIND: kind}, skip_if_exists=True)


def enqueue_refined(
    study: optuna.Study, name: str, plan: MergePlan, refining: Mapping[str, Any]
) -> None:
    """Enqueue a trial of a plan that was refined by gradient and is not in the space.

    Args:
        study: The study.
        name: What the plan is called that it was refined from.
        plan: The refined plan.
        refining: What else is kept of how it was found; ``key`` tells the refinement from others.
    """
    attributes = {_REFINES: name, _PLAN: plan.to_dict(), _REFINING: dict(refining)}
    study.enqueue_trial({}, user_attrs=attributes)  # one write: there is all of it, or nothing


def enqueue_failed(study: optuna.Study) -> int:
    """Enqueue all failed trials again, each once, with its parameters or its refined plan.

    Returns:
        How many there are.
    """
    failed = [trial for trial in standing_trials(study) if trial.state == TrialState.FAIL]
    for trial in failed:
        kept = trial.user_attrs
        attributes = {key: kept[key] for key in (_KIND, _REFINES, _REFINING) if key in kept}
        if is_refined(trial):
            attributes[_PLAN] = kept[_PLAN]  # others' parameters say it
        attributes[_REPEATS] = trial.number
        study.enqueue_trial(dict(trial.params), user_attrs=attributes)
    return len(failed)


def repeats_of(trial: FrozenTrial | optuna.Trial) -> int | None:
    """Return the number of the failed trial that a trial tries again; ``None`` if it does not."""
    number: int | None = trial.user_attrs.get(_REPEATS)
    return number


def repeated(trials: Iterable[FrozenTrial]) -> set[int]:
    """Return the numbers of those failed trials that others of ``trials`` try again."""
    return {number for trial in trials if (number := repeats_of(trial)) is not None}


def standing_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the finished trials, by number, but for failed ones in whose place is another."""
    trials = study.get_trials(deepcopy=False)
    replaced = repeated(trials)
    return [t for t in trials if t.state in FINISHED and t.number not in replaced]


def refines_of(trial: FrozenTrial | optuna.Trial) -> str:
    """Return what the plan is called that a trial's was refined from; empty where it was not."""
    return str(trial.user_attrs.get(_REFINES, ""))


def is_refined(trial: FrozenTrial | optuna.Trial) -> bool:
    """Return whether a trial's plan was refined, and is none that a sampler could propose."""
    return bool(refines_of(trial))


def refining_of(trial: FrozenTrial) -> dict[str, Any]:
    """Return what is kept of how a trial's plan was refined; nothing where it was not."""
    return dict(trial.user_attrs.get(_REFINING, {}))


def refined_plan(trial: optuna.Trial) -> MergePlan | None:
    """Return the plan that a trial was enqueued with; ``None`` where its parameters say it."""
    return MergePlan.from_dict(trial.user_attrs[_PLAN]) if is_refined(trial) else None


def begin(trial: optuna.Trial, plan: MergePlan) -> None:
    """Write the plan of a trial that begins, or is taken up again."""
    trial.set_user_attr(_PLAN, plan.to_dict())


def left_running(study: optuna.Study, storage: BaseStorage) -> list[optuna.Trial]:
    """Return the trials that a stopped run left behind, to be taken up again, by number."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [optuna.Trial(study, _id_of(trial, study, storage)) for trial in trials]


def next_due(study: optuna.Study, storage: BaseStorage) -> optuna.Trial | None:
    """Return the first trial of the queue that is run whatever is left of the budget, begun.

    That is one that was refined, or that tries a failed one again; ``None`` if there is none.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        if is_refined(trial) or repeats_of(trial) is not None:
            trial_id = _id_of(trial, study, storage)
            storage.set_trial_state_values(trial_id, TrialState.RUNNING)
            return optuna.Trial(study, trial_id)
    return None


def _id_of(trial: FrozenTrial, study: optuna.Study, storage: BaseStorage) -> int:
    study_id = storage.get_study_id_from_name(study.study_name)
    return storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)


def count_cut_off(trial: optuna.Trial, n_blocks: int) -> int:
    """Count that a run ended abruptly while it was at this trial.

    Args:
        trial: The trial that was left running.
        n_blocks: Blocks of its plan that are scored.

    Returns:
        How many runs in a row ended so, with no block more scored of it.
    """
    before = Crashes(*trial.user_attrs.get(_CUT_OFF, (0, n_blocks)))
    crashes = before.again(n_blocks)
    trial.set_user_attr(_CUT_OFF, crashes)
    return crashes.n
