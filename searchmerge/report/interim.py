"""The report of a study that was stopped: what it has found so far, and how it goes on."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from searchmerge.durable import write_atomically
from searchmerge.errors import StudyError
from searchmerge.plan import MergePlan
from searchmerge.report.escape import code, markdown
from searchmerge.report.plan_text import plan_text
from searchmerge.report.results import REPORT_FILE, RESULTS_FILE, markdown_table
from searchmerge.search.directory import BEST_SO_FAR


@dataclass(frozen=True, slots=True)
class InterimRow:
    """One plan that was scored in full on what the trials see.

    Attributes:
        name: What the plan is called.
        scores: Task name to score.
        values: The value of each objective.
    """

    name: str
    scores: Mapping[str, float]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class InterimReport:
    """All that is said of a study that was stopped before it was confirmed.

    Attributes:
        study: Name of the study.
        stage: Where it was stopped, in words.
        tasks: Task name to the name of its metric.
        objectives: The name of each objective; none where their values are not known yet.
        rows: References first, then the best trials, best first.
        best: Name of the row with the best evidence; empty where no merge was scored in full.
        plan: Its plan; ``None`` where there is none.
        counts: Numbers of trials by what became of them, examples, seconds.
        raw: Tasks that count as they are scored, for want of an own expert.
        broken: Constraints that the best row breaks; then no other row keeps them all.
        failed: How many trials failed, and why, if any did.
    """

    study: str
    stage: str
    tasks: Mapping[str, str]
    objectives: Sequence[str]
    rows: Sequence[InterimRow]
    best: str
    plan: MergePlan | None
    counts: Mapping[str, float]
    raw: Sequence[str] = ()
    broken: Sequence[str] = ()
    failed: str = ""

    def save(self, run_dir: Path) -> None:
        """Write the report into ``run_dir``, unless that of an earlier, confirmed end is there.

        Raises:
            StudyError: If it cannot be written.
        """
        if (run_dir / RESULTS_FILE).exists():
            return
        try:
            write_atomically(run_dir / REPORT_FILE, self.markdown(run_dir))
        except OSError as error:
            raise StudyError(f"{run_dir}: cannot be written: {error.strerror}") from error

    def markdown(self, run_dir: Path) -> str:
        """Return the report."""
        metrics = ", ".join(markdown(f"{task}: {name}") for task, name in self.tasks.items())
        counts = ", ".join(f"{name} {number:g}" for name, number in self.counts.items())
        cells = [
            [
                row.name,
                *(f"{100 * row.scores[task]:.1f}" for task in self.tasks),
                *(f"{100 * value:.1f}" for value in row.values),
            ]
            for row in self.rows
        ]
        table = markdown_table(["", *self.tasks, *self._value_names()], cells, bold=self.best)
        return f"""# {markdown(self.study)}: stopped, not confirmed

**The study was stopped {self.stage}. {self._best_so_far()}**

The same {code("searchmerge run")} goes on from here and scores nothing again.
{self._finish_text(run_dir)}

Scores times 100, on the select examples, which chose the best: they flatter it. With
{code("scores: graded")} how clearly examples were answered counts in that choice too, and is not
in the table. Metrics: {metrics}.

{table}

Counts: {counts}.
{self._failed_text()}{self._plan_text()}"""

    def _value_names(self) -> list[str]:
        if len(self.objectives) == 1:
            return [f"{self.objectives[0]}, select"]
        return [f"{n}, {'raw' if n in self.raw else 'normalised'}" for n in self.objectives]

    def _best_so_far(self) -> str:
        if not self.best:
            return "No merge has been scored in full yet."
        broken = markdown(", ".join(self.broken))
        breaks = f", though it breaks {broken}: none keeps every constraint" if broken else ""
        return (
            f"The best plan so far is that of {markdown(self.best)}{breaks}; it is not confirmed."
        )

    def _finish_text(self, run_dir: Path) -> str:
        """Return what is done where the search does not go on."""
        if not self.best:
            return "Until a merge is scored in full there is nothing to confirm and to save."
        return (
            f"{code(f'searchmerge finish {shlex.quote(str(run_dir))}')} searches no more: it "
            "confirms the best\nthat was scored on held-out examples, saves the model, and writes "
            "the report in place of this one."
        )

    def _failed_text(self) -> str:
        return f"\n{markdown(self.failed)}\n" if self.failed else ""

    def _plan_text(self) -> str:
        if self.plan is None:
            return ""
        return f"\n## The best plan so far\n\n{plan_text(self.plan, BEST_SO_FAR)}\n"
