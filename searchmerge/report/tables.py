"""From what a study has scored to what its report shows: rows, constraints, points, counts."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from searchmerge.execution.blocks import Part
from searchmerge.plan import MergePlan
from searchmerge.report.results import Bound, Detail, Point, PointKind, Row, Searched
from searchmerge.search.confirm import Confirmation, Interval
from searchmerge.search.grades import Grader, Reading
from searchmerge.search.objective import Objective
from searchmerge.search.references import BASE
from searchmerge.search.runner import TasksOf
from searchmerge.search.schedule import Schedule
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.trials import TrialRecord, front_of


def make_rows(
    board: Scoreboard,
    plans: Mapping[str, MergePlan],
    candidates: Collection[str],
    confirmation: Confirmation,
    tasks: TasksOf,
) -> list[Row]:
    """Return what each plan scores, in the order of ``plans``.

    Args:
        board: Holds their scores.
        plans: Name to plan, references and candidates.
        candidates: The names of those that the search found.
        confirmation: Their objective on held-out examples, and the winner's lead.
        tasks: Plan name to the tasks that it is scored on there.
    """
    rows = []
    for name, plan in plans.items():
        interval, lead = confirmation.objective.get(name), confirmation.lead.get(name)
        rows.append(
            Row(
                name,
                board.scores(plan, "select"),
                board.scores(plan, "hold_out", tasks[name]),
                (interval.value, interval.low, interval.high) if interval else (),
                name in candidates,
                _told_lead(lead, is_known=not confirmation.single) if lead else (),
            )
        )
    return rows


def _told_lead(lead: Interval, *, is_known: bool) -> tuple[float, ...]:
    """Return a lead with its interval, or alone where some task's examples give one number."""
    return (lead.value, lead.low, lead.high) if is_known else (lead.value,)


def held_out_objective(
    objective: Objective, rows: Iterable[Row], experts: Mapping[str, str]
) -> tuple[Objective, tuple[str, ...]]:
    """Return the objective relative to what the experts and the base score on held-out examples.

    Args:
        objective: Relative to what they score on what trials see.
        rows: All rows; those of experts and base may be missing, or have some tasks alone.
        experts: Task name to the row name of its own expert.

    Returns:
        It, and what cannot be divided by there, in words.
    """
    hold_out = {row.name: row.hold_out for row in rows}
    known = {t: hold_out[n][t] for t, n in experts.items() if t in hold_out.get(n, {})}
    base = hold_out.get(BASE, {})
    return objective.on_other_examples(known, base), objective.undivided(known, base)


def make_bounds(winner: Row, objective: Objective, held_out: Objective) -> list[Bound]:
    """Return how the winner stands to each constraint, on what trials saw and held out.

    Args:
        winner: The winner's row.
        objective: Relative to what experts and base score on what trials saw.
        held_out: The same, relative to what they score on held-out examples.
    """
    return [
        Bound(
            constraint.name,
            constraint.at_least,
            constraint.at_least - objective.violation(constraint, winner.select),
            constraint.at_least - held_out.violation(constraint, winner.hold_out),
        )
        for constraint in objective.constraints
    ]


def make_points(
    scored: Sequence[TrialRecord], rows: Sequence[Row], objective: Objective
) -> list[Point]:
    """Return all that was scored in full as points of several objectives; none of one.

    Args:
        scored: The trials that have a score.
        rows: All rows, of which the references become points.
        objective: What the search maximised.
    """
    if len(objective.names) < 2:
        return []
    full = [record for record in scored if record.is_full]
    front = {record.number for record in front_of(full)}
    points: list[tuple[str, Mapping[str, float], PointKind]] = [
        (record.name, record.scores, "front" if record.number in front else "trial")
        for record in full
    ]
    points += [(row.name, row.select, "reference") for row in rows if not row.is_candidate]
    return [
        Point(name, dict(zip(objective.names, objective.values(scores), strict=True)), kind)
        for name, scores, kind in points
    ]


def make_details(
    board: Scoreboard, plans: Mapping[str, MergePlan], names: Sequence[str]
) -> list[Detail]:
    """Return the held-out scores of tasks' other metrics and of their members.

    Args:
        board: Holds the plans' scores, all in full.
        plans: Name to plan.
        names: Which of them are shown.
    """
    details = []
    for task, info in board.schedule.tasks.items():
        values: dict[str, dict[str, dict[int, float]]] = {}
        for name in names:
            answers = board.store.answers(plans[name], task, "hold_out")
            for metric in info.other_metrics:
                known = {answer.example: answer.metrics[metric] for answer in answers}
                values.setdefault(metric, {})[name] = known
            for member, examples in info.members_of("hold_out"):
                scored = board.by_example(plans[name], task, "hold_out")
                known = {e: score for e, score in scored.items() if e in examples}
                values.setdefault(member.name, {})[name] = known
        for label, by_plan in values.items():
            n_examples = len(by_plan[names[0]])
            if n_examples:
                scores = {name: fmean(scored.values()) for name, scored in by_plan.items()}
                details.append(Detail(task, label, n_examples, scores))
    return details


def told_sources(schedule: Schedule, folder: Path) -> dict[str, dict[str, str]]:
    """Return what the parts of tasks are drawn from where that differs, by task and part.

    Args:
        schedule: What is scored.
        folder: The study's, from which files are named.
    """
    return {
        task: {part: its.source.replace(f"{folder}/", "") for part, its in info.parts.items()}
        for task, info in schedule.tasks.items()
        if info.parts
    }


def make_searched(records: Iterable[TrialRecord]) -> list[Searched]:
    """Return what trials went to: each method, with one coefficient, one per expert, or refined.

    Args:
        records: The trials that have a score.
    """
    groups: dict[str, list[TrialRecord]] = {}
    for record in records:
        rows = record.plan.values.get("coefficient", ())
        is_fine = any(len(set(row)) > 1 for row in rows) or len(set(rows)) > 1
        which = "a coefficient each" if is_fine else "one coefficient"
        what = f"{record.plan.method}, {'refined' if record.refines else which}"
        groups.setdefault(what, []).append(record)
    made = [
        Searched(
            what,
            len(its),
            sum(record.is_full for record in its),
            max((record.value for record in its if record.value is not None), default=0.0),
        )
        for what, its in groups.items()
    ]
    return sorted(made, key=lambda searched: -searched.best)


def told_readings(grader: Grader) -> dict[str, str]:
    """Return how a grader reads each task, in words."""
    return {task: _told_reading(reading) for task, reading in grader.readings.items()}


def _told_reading(reading: Reading) -> str:
    if reading.agreement is None:
        return "by the metric alone, as too few plans were scored to learn from, or all alike"
    agreement = f"over the plans the two have a correlation of {reading.agreement:+.2f}"
    if not reading.steps:
        told = "contradicts" if reading.contradicts else "does not tell better"
        return f"by the metric alone, which how clearly examples were answered {told}: {agreement}"
    return f"{100 * reading.weight:.0f} % by how clearly they were answered: {agreement}"


def make_counts(
    records: Sequence[TrialRecord], schedule: Schedule, search_s: float, refining_s: float
) -> dict[str, float]:
    """Return the numbers of trials by what became of them, of examples, and of seconds.

    Refined trials, which the budget does not count, are told apart where there are any.
    """
    n_failed = sum(record.value is None for record in records)
    n_stopped = sum(record.stopped_after is not None for record in records)
    counts: dict[str, float] = {
        "trials in full": len(records) - n_failed - n_stopped,
        "trials stopped early": n_stopped,
    }
    if n_completed := sum(record.is_completed for record in records):
        counts["of these scored in full since"] = n_completed
    counts["trials failed"] = n_failed
    if n_refined := sum(bool(record.refines) for record in records):
        counts["of these refined"] = n_refined
    if n_again := sum(record.repeats is not None for record in records):
        counts["trials tried again after they failed"] = n_again
    seen: Part = "select" if "select" in schedule.blocks else "pilot"  # among the references
    parts: dict[str, Part] = {"select": seen, "hold-out": "hold_out"}
    counts |= {f"{label} examples": schedule.n_examples(part) for label, part in parts.items()}
    counts["search seconds"] = round(search_s)
    return counts | ({"refining seconds": round(refining_s)} if refining_s else {})
