"""Beginning where an earlier study ended: its best plans, as this study's first trials."""

from pathlib import Path

from searchmerge.errors import SpecError, StudyError
from searchmerge.plan import MergePlan, SettingValue
from searchmerge.search.directory import records_of, stored_study
from searchmerge.search.space import SearchSpace
from searchmerge.search.trials import ranked


def earlier_plans(run_dir: Path, n_plans: int) -> list[MergePlan]:
    """Return the best plans of the study in ``run_dir``, best first, each once.

    Ranked as that study ranks them, by expected scores where a plan was stopped early; plans
    that break its constraints come last. Refined ones are left out: they are in no space.

    Raises:
        StudyError: If there is no study in ``run_dir``.
    """
    with stored_study(run_dir) as study:
        records = [record for record in records_of(study) if not record.refines]
        plans = [record.plan for record in ranked(records)]
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
    params = []
    for run_dir in run_dirs:
        try:
            plans = earlier_plans(run_dir, n_plans)
        except StudyError as error:
            raise StudyError(f"search.warm_start: {error}") from error
        if not plans:
            raise SpecError(
                f"search.warm_start: no trial of {run_dir} has a score, of which plans are taken; "
                "run that study on, or name another here"
            )
        nearest = [space.nearest(plan) for plan in plans]
        fitting = [trial_params for trial_params in nearest if trial_params is not None]
        if not fitting:
            methods = sorted({a.method for a in space.alternatives.values()})
            raise SpecError(
                f"search.warm_start: none of the {len(nearest)} best plans of {run_dir} fits this "
                f"space, which merges {', '.join(space.experts)} by {', '.join(methods)}"
            )
        params += fitting
    return params
