"""How far a study is, read beside a running driver or after its end."""

from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from searchmerge.search.directory import (
    best_so_far_of,
    elapsed_of,
    is_at_work,
    is_held,
    records_of,
    stored_study,
)
from searchmerge.search.failures import failure_reasons, told_failures
from searchmerge.search.roster import read_roster
from searchmerge.search.trials import best_of, by_completion, repeats_of
from searchmerge.wording import counted

_N_BEST = 5


def read_status(run_dir: Path, storage: str | None = None) -> dict[str, Any]:
    """Return counts of trials by state, seconds so far, the workers, and what is best.

    Failed trials are those that no other one is to try again.

    Trials that a stopped run left behind are running as Optuna has it, though none is at work.
    Of a run that is not known to have ended and that holds the directory no more, as far as this
    machine sees, it is said that it ended abruptly.

    The plan that has the best evidence is a reference or a trial. The best trials are ranked as
    the study ranks them, by how it last read their scores: of those that were scored in full,
    plans that keep the constraints alone, where there is one.

    Args:
        run_dir: The study's run directory.
        storage: As in the config; needed only where it is a URL with a password.

    Raises:
        StudyError: If there is no study in ``run_dir``.
    """
    held_before = is_held(run_dir)
    with stored_study(run_dir, storage) as study:
        records, elapsed_s = records_of(study), elapsed_of(study)
        best_so_far, is_noted = best_so_far_of(study), is_at_work(study)
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    workers, workers_age_s = read_roster(run_dir)
    held = held_before or is_held(run_dir)  # it may have begun, or ended, since
    holds = is_noted if held is None else held
    n_failed = sum(record.value is None for record in records)
    return {
        "study": study.study_name,
        "trials": {
            "complete": len(records) - n_failed,
            "running": len(running),
            "fail": n_failed,
        },
        "to_try_again": sum(repeats_of(trial) is not None for trial in waiting),
        "failures": failure_reasons(records),
        "at_work": holds,
        "ended_abruptly": is_noted and not holds,
        "refined": sum(bool(record.refines) for record in records),
        "stopped_early": sum(record.stopped_after is not None for record in records),
        "elapsed_s": elapsed_s,
        "workers": workers,
        "workers_age_s": workers_age_s,
        "best_so_far": best_so_far,
        "best": [
            {
                "name": record.name,
                "trial": record.number,
                "kind": record.kind,
                "values": list(record.values),
                "scores": record.scores,
                "feasible": record.is_feasible,
            }
            for record in best_of(by_completion(r for r in records if r.is_full), _N_BEST)
        ],
    }


def describe_status(run_dir: Path, storage: str | None = None) -> list[str]:
    """Return the same as lines for a person.

    Raises:
        StudyError: If there is no study in ``run_dir``.
    """
    status = read_status(run_dir, storage)
    trials = status["trials"]
    n_begun = trials["running"]
    is_stopped = n_begun and not status["at_work"]
    begun = f"{n_begun} to be taken up again" if is_stopped else f"{n_begun} running"
    of_these = [f"{status['stopped_early']} stopped early"]
    if status["refined"]:
        of_these.append(f"{status['refined']} refined")
    n_again = status["to_try_again"]
    again = f", {n_again} to be tried again" if n_again else ""
    lines = [
        f"{status['study']}: {counted(trials['complete'], 'trial')} complete "
        f"({', '.join(of_these)}), {begun}, "
        f"{trials['fail']} failed{again}, {status['elapsed_s']:.0f} s"
    ]
    n_finished = trials["complete"] + trials["fail"]
    if failed := told_failures(status["failures"], n_finished):
        lines.append(failed)
    if status["ended_abruptly"]:
        lines.append(
            "its last run ended abruptly, by a kill, say: the same command goes on (unless it is "
            "on a machine whose locks are not seen here)"
        )
    width = max((len(best["name"]) for best in status["best"]), default=0)
    for best in status["best"]:
        values = ", ".join(f"{value:.4f}" for value in best["values"])
        scores = "  ".join(f"{task} {score:.3f}" for task, score in best["scores"].items())
        marks = ["breaks a constraint"] * (not best["feasible"]) + [best["kind"]]
        line = f"  {best['name']:<{width}}  {values}  {scores}  {', '.join(filter(None, marks))}"
        lines.append(line.rstrip())
    if status["best_so_far"]:
        lines.append(f"best evidence so far, of references and trials: {status['best_so_far']}")
    if status["workers"]:
        lines.append(f"workers, as they were {status['workers_age_s']:.0f} s ago:")
    for worker in status["workers"]:
        where = ", ".join(filter(None, (worker["node"], worker["device"])))
        done = f"{counted(worker['trials'], 'trial')}, {worker['examples_per_s']:.1f} examples/s"
        lines.append(f"  {worker['name']:<11} {worker['doing']:<8} {done}  {where}".rstrip())
    return lines
