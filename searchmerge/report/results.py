"""The results of a study, as data and as the written report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from searchmerge.durable import read_checked, with_checksum, write_atomically
from searchmerge.errors import StudyError
from searchmerge.plan import MergePlan
from searchmerge.report.escape import code_cell, markdown
from searchmerge.report.plan_text import plan_text

RESULTS_FILE = "results.json"
REPORT_FILE = "report.md"
LEAD = "saved is ahead by"
PointKind = Literal["trial", "front", "reference"]


@dataclass(frozen=True, slots=True)
class Row:
    """One plan of the table.

    Attributes:
        name: What the plan is called.
        select: Task name to score on what the trials saw.
        hold_out: Task name to score on held-out examples, of the tasks that it is scored on.
        objective: The objective on held-out examples: value, low, high; empty where it is not
            scored on all tasks.
        is_candidate: Whether the search found it.
        lead: The winner's objective minus its, on held-out examples: value, low, high; the value
            alone where no interval can be given; empty for the winner.
    """

    name: str
    select: Mapping[str, float]
    hold_out: Mapping[str, float]
    objective: tuple[float, ...]
    is_candidate: bool
    lead: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Bound:
    """How the winner stands to a constraint.

    Attributes:
        name: The constraint in words.
        at_least: The smallest value allowed.
        select: The winner's value on what the trials saw.
        hold_out: The winner's value on held-out examples.
    """

    name: str
    at_least: float
    select: float
    hold_out: float


@dataclass(frozen=True, slots=True)
class Point:
    """What was scored in full, as a point of several objectives.

    Attributes:
        name: What the plan is called.
        values: Objective name to value, on what the trials saw.
        kind: A trial, one on the front, or a reference.
    """

    name: str
    values: Mapping[str, float]
    kind: PointKind


@dataclass(frozen=True, slots=True)
class Detail:
    """A score beside those of the table, on held-out examples.

    Attributes:
        task: The task's name.
        name: Of another metric of the task, or of a member whose examples are part of it.
        n_examples: How many examples it is of.
        scores: Name of the winner and of each reference to its score.
    """

    task: str
    name: str
    n_examples: int
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Searched:
    """What a part of the trials was.

    Attributes:
        what: The method, and whether its experts had coefficients of their own.
        trials: How many trials have a score, references among them.
        full: How many of them were scored in full.
        best: The best of their objectives on what trials see, as estimated.
    """

    what: str
    trials: int
    full: int
    best: float


@dataclass(frozen=True, slots=True)
class Results:
    """All that a report says.

    Attributes:
        study: Name of the study.
        tasks: Task name to the name of its metric.
        objective: Name of the objective.
        rows: References first, then candidates.
        winner: Name of the winning row.
        verdict: One sentence on winner and best reference.
        plan: The winner's plan.
        counts: Numbers of trials by what became of them, examples, seconds.
        level: Of the intervals, in (0, 1).
        made_of: Name to source and fingerprint of every model, the versions used, and how merges
            were computed.
        bounds: How the winner stands to each constraint.
        points: Of a study with several objectives, all that was scored in full.
        details: Scores by other metrics, and of tasks' members.
        searched: What the trials went to.
        readings: Task to how its examples were read, in words.
        drawn_from: Task to what the examples of each part are drawn from, by the part's name;
            of tasks whose parts are drawn from different data.
        breaking: Plans that break a constraint on what trials saw, which what is saved keeps.
        raw: Tasks that count as they are scored though the objective is relative to experts.
        undivided: What scores 0 held out, or is not scored there, so that held-out scores are
            relative to its score on what trials saw, in words.
        missing: References and best candidates that are not in the table to why.
        ended: Where the search ended, if before its budget was used up.
        failed: How many trials failed, and why, if any did.
        is_saved: Whether the winner's model is there.
    """

    study: str
    tasks: Mapping[str, str]
    objective: str
    rows: Sequence[Row]
    winner: str
    verdict: str
    plan: Mapping[str, Any]
    counts: Mapping[str, float]
    level: float
    made_of: Mapping[str, str]
    bounds: Sequence[Bound] = ()
    points: Sequence[Point] = ()
    details: Sequence[Detail] = ()
    searched: Sequence[Searched] = ()
    readings: Mapping[str, str] = field(default_factory=dict)
    drawn_from: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    breaking: Sequence[str] = ()
    raw: Sequence[str] = ()
    undivided: Sequence[str] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    ended: str = ""
    failed: str = ""
    is_saved: bool = True

    @property
    def merge_plan(self) -> MergePlan:
        """Return the winner's plan."""
        return MergePlan.from_dict(self.plan)

    @property
    def unsaved(self) -> str:
        """Return that the model is not there, or nothing where it is."""
        if self.is_saved:
            return ""
        return "The model is not saved yet; the same `searchmerge run` saves it."

    @property
    def front_title(self) -> str:
        """Return what stands above the page of the front, which is of select examples."""
        named = [f"{task} from {of['select']}" for task, of in self.drawn_from.items()]
        return f"{self.study}, on select examples{': ' if named else ''}{', '.join(named)}"

    def save(self, run_dir: Path) -> None:
        """Write the data and the report into ``run_dir``.

        Raises:
            StudyError: If they cannot be written.
        """
        try:
            write_atomically(run_dir / REPORT_FILE, self.markdown())
            write_atomically(run_dir / RESULTS_FILE, with_checksum(asdict(self)))
        except OSError as error:
            raise StudyError(f"{run_dir}: cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, run_dir: Path) -> "Results":
        """Read what :meth:`save` wrote.

        Raises:
            StudyError: If there are no results in ``run_dir``, or they are damaged.
        """
        file = run_dir / RESULTS_FILE
        try:
            data = read_checked(file)
        except FileNotFoundError as error:
            raise StudyError(
                f"{run_dir}: no results yet; the study writes {RESULTS_FILE} once it is confirmed"
            ) from error
        except OSError as error:
            raise StudyError(f"{file}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise StudyError(
                f"{file}: {error}; `searchmerge run` with the same study writes it again"
            ) from error
        data["rows"] = [
            Row(
                **{
                    **row,
                    "objective": tuple(row["objective"]),
                    "lead": tuple(row.get("lead", ())),  # results of before do not have it
                }
            )
            for row in data["rows"]
        ]
        data["bounds"] = [Bound(**bound) for bound in data.get("bounds", ())]
        data["points"] = [Point(**point) for point in data.get("points", ())]
        data["details"] = [Detail(**detail) for detail in data.get("details", ())]
        data["searched"] = [Searched(**searched) for searched in data.get("searched", ())]
        for names in ("breaking", "raw", "undivided"):
            data[names] = tuple(data.get(names, ()))
        return cls(**data)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the cells: scores as select / held-out, in per cent.

        The last column is the winner's lead, where it is known.
        """
        has_lead = any(row.lead for row in self.rows)
        header = ["", *self.tasks, f"{self.objective}, held out"]
        header += [LEAD] if has_lead else []
        cells = []
        for row in self.rows:
            scores = [
                f"{_percent(row.select[task])} / {_percent(row.hold_out.get(task))}"
                for task in self.tasks
            ]
            value, *ends = map(_percent, row.objective or (None,))
            cells.append([row.name, *scores, f"{value} [{', '.join(ends)}]" if ends else value])
            cells[-1] += [_lead_text(row.lead)] if has_lead else []
        return header, cells

    @property
    def legend(self) -> str:
        """Return what the numbers of the table are, in words."""
        legend = (
            "Scores are times 100, as select / held out: trials saw the select examples only. In "
            f"brackets {100 * self.level:g} % intervals of a paired bootstrap over held-out "
            "examples. "
        )
        if any(row.hold_out.keys() < row.select.keys() for row in self.rows):
            legend += (
                "Held out each expert is scored on the tasks that name it alone, and the base "
                "where a constraint is held against it: confirm.experts. "
            )
        if any(row.lead for row in self.rows):
            legend += "The last column is what is saved minus the plan of that row, in points. "
        if self.raw:
            legend += f"Not over an expert's score but as it is: {', '.join(self.raw)}. "
        if self.undivided:
            legend += (
                "Held out nothing can be divided by what these score there, 0 or unknown, and "
                f"their select scores stand in: {', '.join(self.undivided)}. "
            )
        return (
            f"{legend}These are single comparisons: only the verdict's interval is corrected for "
            "having chosen the best of the candidates."
        )

    def markdown(self) -> str:
        """Return the report."""
        header, cells = self.table()
        metrics = ", ".join(markdown(f"{task}: {name}") for task, name in self.tasks.items())
        counts = ", ".join(f"{name} {number:g}" for name, number in self.counts.items())
        sources = "\n".join(
            f"| {markdown(n)} | {code_cell(of)} |" for n, of in self.made_of.items()
        )
        parts = (
            self.ended,
            markdown(self.failed),
            self._missing_text(),
            self.drawn_from_text(),
            self._bounds_text(),
            self._front_text(),
            self._searched_text(),
            self._readings_text(),
            self._details_text(),
        )
        more = "".join(part + "\n\n" for part in parts if part)
        verdict = f"{self.unsaved}\n\n**{markdown(self.verdict)}**".lstrip()
        return f"""# {markdown(self.study)}

{verdict}

{markdown(self.legend)} Objective: {self.objective}; metrics: {metrics}.

{markdown_table(header, cells, bold=self.winner)}

{more}Counts: {counts}.

## The winner's plan

{plan_text(self.merge_plan, self.winner)}

## Made of

| | |
|---|---|
{sources}
"""

    def _missing_text(self) -> str:
        """Return which references are not in the table, or nothing if all are."""
        if not self.missing:
            return ""
        lines = "\n".join(f"- {markdown(f'{n}: {why}')}" for n, why in self.missing.items())
        return f"Not in the table:\n\n{lines}"

    def drawn_from_text(self) -> str:
        """Return which data select and held-out examples are from, or nothing if from the same."""
        if not self.drawn_from:
            return ""
        cells = [[task, of["select"], of["hold_out"]] for task, of in self.drawn_from.items()]
        table = markdown_table(["", "select", "held out"], cells)
        return f"Select and held-out examples are drawn from different data:\n\n{table}"

    def _bounds_text(self) -> str:
        """Return the constraints as a table, or nothing where there is none."""
        if not self.bounds:
            return ""
        cells = [
            [b.name]
            + [f"{v:.3f}{'' if v >= b.at_least else ' (broken)'}" for v in (b.select, b.hold_out)]
            for b in self.bounds
        ]
        table = markdown_table(["", "select", "held out"], cells)
        text = f"The winner and the constraints:\n\n{table}"
        if self.breaking:
            names = markdown(", ".join(self.breaking))
            text += f"\n\nNot to be saved, as they break one on select examples: {names}."
        return text

    def _searched_text(self) -> str:
        """Return what the trials went to, as a table, or nothing."""
        if not self.searched:
            return ""
        cells = [
            [s.what, str(s.trials), str(s.full), f"{100 * s.best:.1f}"] for s in self.searched
        ]
        header = ["what was searched", "trials", "in full", "best on select, estimated"]
        table = markdown_table(header, cells)
        return f"{table}\n\nReferences that lie in the space are among these trials."

    def _readings_text(self) -> str:
        """Return how examples were read when plans were compared, or nothing."""
        if not self.readings:
            return ""
        lines = "\n".join(f"- {markdown(f'{t}: {how}')}" for t, how in self.readings.items())
        return (
            "Plans were compared by the metric and by how clearly examples were answered, as far "
            f"as one half of the select examples told the metric on the other:\n\n{lines}"
        )

    def _details_text(self) -> str:
        """Return other metrics and members as a table to fold out, or nothing."""
        if not self.details:
            return ""
        names = list(self.details[0].scores)
        cells = [
            [f"{d.task}: {d.name}", str(d.n_examples)]
            + [f"{100 * d.scores[name]:.1f}" for name in names]
            for d in self.details
        ]
        table = markdown_table(["held out", "examples", *names], cells)
        return (
            "<details>\n<summary>Other metrics, and the members of tasks</summary>\n\n"
            f"{table}\n\n</details>"
        )

    def _front_text(self) -> str:
        """Return the front as a table, or nothing where there is one objective."""
        front = [point for point in self.points if point.kind == "front"]
        if not front:
            return ""
        names = list(front[0].values)
        ordered = sorted(front, key=lambda point: -point.values[names[0]])
        cells = [[p.name, *(f"{p.values[name]:.4f}" for name in names)] for p in ordered]
        return (
            "The front: plans that no other is as good as in every objective, on the select "
            f"examples.\n\n{markdown_table(['', *names], cells)}"
        )


def _percent(number: float | None) -> str:
    return "–" if number is None else f"{100 * number:.1f}"


def _lead_text(lead: Sequence[float]) -> str:
    """Return a lead in points, with its interval where there is one; empty for the winner."""
    if not lead:
        return ""
    value, *interval = (f"{100 * number:+.1f}" for number in lead)
    return f"{value} [{', '.join(interval)}]" if interval else value


def markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]], bold: str = "") -> str:
    """Return plain text as a Markdown table; the row whose first cell is ``bold`` stands out."""
    lines = ["| " + " | ".join(map(markdown, header)) + " |", "|" + "---|" * len(header)]
    for row in cells:
        shown = list(map(markdown, row))
        if row[0] == bold:
            shown = [f"**{cell}**" if cell else "" for cell in shown]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)
