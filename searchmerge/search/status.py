"""How far a study is, read beside a running driver or after its end."""

import contextlib
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from searchmerge.search.runner import RESULT
from searchmerge.search.storage import close_storage, find_study, storage_errors
from searchmerge.search.study import ELAPSED, quiet_optuna


def read_status(run_dir: Path, storage: str | None = None) -> dict[str, Any]:
    """Return counts of trials by state, seconds so far, and the best trials.

    Args:
        run_dir: The study's run directory.
        storage: As in the config; needed only where it is a URL with a password.

    Raises:
        StudyError: If there is no study in ``run_dir``.
    """
    quiet_optuna()
    name, opened = find_study(run_dir, storage)
    with storage_errors(run_dir, storage), contextlib.ExitStack() as stack:
        stack.callback(close_storage, opened)
        study = optuna.load_study(study_name=name, storage=opened)
        trials = study.get_trials(deepcopy=False)
        elapsed_s = float(study.user_attrs.get(ELAPSED, 0.0))
    full = [trial for trial in trials if _is_full(trial)]
    ranked = sorted(full, key=lambda trial: -sum(trial.values or ()))
    return {
        "study": name,
        "trials": {
            state.name.lower(): sum(trial.state == state for trial in trials)
            for state in (TrialState.COMPLETE, TrialState.RUNNING, TrialState.FAIL)
        },
        "stopped_early": sum(t.state == TrialState.COMPLETE for t in trials) - len(full),
        "elapsed_s": elapsed_s,
        "best": [
            {"trial": t.number, "values": t.values, "scores": t.user_attrs[RESULT]["scores"]}
            for t in ranked[:5]
        ],
    }


def describe_status(run_dir: Path, storage: str | None = None) -> list[str]:
    """Return the same as lines for a person.

    Raises:
        StudyError: If there is no study in ``run_dir``.
    """
    status = read_status(run_dir, storage)
    trials = status["trials"]
    lines = [
        f"{status['study']}: {trials['complete']} trials complete "
        f"({status['stopped_early']} stopped early), {trials['running']} running, "
        f"{trials['fail']} failed, {status['elapsed_s']:.0f} s"
    ]
    for best in status["best"]:
        values = ", ".join(f"{value:.4f}" for value in best["values"])
        scores = "  ".join(f"{task} {score:.3f}" for task, score in best["scores"].items())
        lines.append(f"  trial {best['trial']:<5} {values}  {scores}")
    return lines


def _is_full(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE and trial.user_attrs[RESULT]["partial"] is None
