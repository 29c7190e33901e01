"""Beginning where an earlier study ended: its best plans, as this study's first trials."""

from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from searchmerge.errors import SpecError, StudyError
from searchmerge.plan import MergePlan, SettingValue
from searchmerge.search.runner import PLAN
from searchmerge.search.space import SearchSpace
from searchmerge.search.storage import find_study, storage_errors
from searchmerge.search.study import quiet_optuna


def earlier_plans(run_dir: Path, n_plans: int) -> list[MergePlan]:
    """Return the best plans of the study in ``run_dir``, best first.

    Best by the sum of its objectives, expected ones where a plan was stopped early; those that
    keep its constraints come first.

    Raises:
        StudyError: If there is no study in ``run_dir``.
    """
    quiet_optuna()
    name, storage = find_study(run_dir)
    with storage_errors(run_dir):
        study = optuna.load_study(study_name=name, storage=storage)
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    scored = [trial for trial in complete if PLAN in trial.user_attrs]
    plans = [MergePlan.from_dict(t.user_attrs[PLAN]) for t in sorted(scored, key=_rank)]
    return list({plan.digest: plan for plan in plans}.values())[:n_plans]


def warm_start_params(
    run_dirs: list[Path], space: SearchSpace, n_plans: int
) -> list[dict[str, SettingValue]]:
    """Return the parameters that come nearest to earlier studies' best plans, best first.

    Args:
        run_dirs: Run directories of earlier studies with the same experts.
        space: The space of this study.
        n_plans: How many plans to take of each.

    Raises:
        SpecError: If an earlier study has no plan that was scored, or none fits this space.
        StudyError: If a directory holds no study.
    """
    found = []
    for run_dir in run_dirs:
        try:
            plans = earlier_plans(run_dir, n_plans)
        except StudyError as error:
            raise StudyError(f"search.warm_start: {error}") from error
        if not plans:
            raise SpecError(f"search.warm_start: no trial of {run_dir} has a score yet")
        nearest = [space.nearest(plan) for plan in plans]
        fitting = [params for params in nearest if params is not None]
        if not fitting:
            methods = sorted({a.method for a in space.alternatives.values()})
            raise SpecError(
                f"search.warm_start: none of the {len(nearest)} best plans of {run_dir} fits this "
                f"space, which merges {', '.join(space.experts)} by {', '.join(methods)}"
            )
        found += fitting
    return found


def _rank(trial: FrozenTrial) -> tuple[float, float]:
    return (sum(max(0.0, v) for v in trial.constraints.values()), -sum(trial.values or ()))
