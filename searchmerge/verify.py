"""Holding a finished study's scores against those of lm-eval's own harness on the saved model."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from searchmerge import assemble
from searchmerge.config import RunConfig
from searchmerge.errors import StudyError
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.evaluators.lm_harness.verification import OwnHarness, harnesses
from searchmerge.execution.blocks import Part
from searchmerge.models import open_models
from searchmerge.plan import MergePlan
from searchmerge.report.results import Results
from searchmerge.saving import MODEL_DIR, is_saved
from searchmerge.search.directory import SCORES_FILE
from searchmerge.search.scores import ScoreStore
from searchmerge.study import Study, kept_study

_ROUNDING = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.02}
"""Difference of two scores up to which they may differ by the order of sums in a forward pass:
of their size where that is above 1. In half precision it may tip one example over however few
there are."""


@dataclass(frozen=True)
class Comparison:
    """A task's score here and in lm-eval's own harness, on the same examples.

    Attributes:
        task: The study's name of the task.
        part: Which examples.
        n_examples: How many.
        ours: The score of the report.
        theirs: lm-eval's.
        rounding: Up to which difference that is rounding.
        notes: Why they may differ though nothing is wrong, a sentence each.
    """

    task: str
    part: Part
    n_examples: int
    ours: float
    theirs: float
    rounding: float
    notes: tuple[str, ...] = ()

    @property
    def difference(self) -> float:
        """Return by how much lm-eval's score is higher."""
        return self.theirs - self.ours

    @property
    def beyond(self) -> float:
        """Return by how much they differ beyond rounding; 0 where they do not."""
        excess = abs(self.difference) - self.rounding * max(1.0, abs(self.ours))
        return max(0.0, excess)

    @property
    def is_wrong(self) -> bool:
        """Whether they differ beyond rounding, and nothing is noted that explains it."""
        return self.beyond > 0 and not self.notes


class Verification:
    """One finished run, and what lm-eval says of the model that it saved.

    Args:
        run_dir: The run directory.
        config: What machine.

    Raises:
        StudyError: If the run is not finished, or has no task of lm-eval's.
    """

    def __init__(self, run_dir: Path, config: RunConfig) -> None:
        self._run_dir = run_dir
        self._results = Results.load(run_dir)
        study = kept_study(run_dir)
        models = open_models(study)
        device = assemble.pick_device(config)
        evaluators = assemble.make_evaluators(study, models, device)
        infos = {name: evaluator.tasks[name] for name, evaluator in evaluators.items()}
        self._schedule = assemble.make_schedule(study, infos)
        self._infos: Mapping[str, TaskInfo] = infos
        self._dtype = models.dtype
        self._theirs = {
            name: OwnHarness(
                ours,
                model_dir=run_dir / MODEL_DIR,
                dtype=models.dtype,
                device=device,
                trust_remote_code=study.spec.trust_remote_code,
            )
            for name, ours in harnesses(evaluators).items()
        }
        _check(run_dir, study, self._results, has_tasks=bool(self._theirs))

    def compare(self, limit: int | None = None) -> Iterator[Comparison]:
        """Yield each task's comparison, on the report's select and held-out examples.

        Args:
            limit: Compare only as many of a task's held-out examples.
        """
        if limit is None:
            [row] = [row for row in self._results.rows if row.name == self._results.winner]
            reported: dict[Part, Mapping[str, float]] = {
                "select": row.select,
                "hold_out": row.hold_out,
            }
            for task in self._theirs:
                for part, scores in reported.items():
                    yield self._compare(task, part, self._examples(task, part), scores[task])
            return
        with contextlib.closing(ScoreStore(self._run_dir / SCORES_FILE)) as store:
            plan = self._results.merge_plan
            scored = {task: self._scored(store, plan, task, limit) for task in self._theirs}
        for task, (examples, score) in scored.items():
            yield self._compare(task, "hold_out", examples, score)

    def told(self, compared: Sequence[Comparison]) -> Iterator[str]:
        """Yield what a person must know of comparisons, a sentence each."""
        for task in self._infos:
            if task not in self._theirs:
                yield f"{task}: not a task of lm-eval's, so not compared"
        for c in compared:
            where = f"{c.task}, {c.part}"
            if c.is_wrong:
                yield (
                    f"{where}: lm-eval's score of the saved model differs from the report's by "
                    f"{c.difference:+.6f}, {c.beyond:.6f} beyond rounding"
                )
            elif c.beyond:
                yield f"{where}: differs by {c.difference:+.6f}, as it may: {'; '.join(c.notes)}"
        if not any(c.is_wrong for c in compared):
            yield "The saved model scores in lm-eval what the report says."

    def _examples(self, task: str, part: Part) -> tuple[int, ...]:
        # the pilot's examples are those of select, before references decide their order
        blocks = self._schedule.blocks["pilot" if part == "select" else part][task]
        return tuple(example for block in blocks for example in block.examples)

    def _scored(
        self, store: ScoreStore, plan: MergePlan, task: str, limit: int
    ) -> tuple[tuple[int, ...], float]:
        """Return a task's first held-out examples, and what they scored in the study.

        All are returned where there is one number for all.
        """
        examples, kind = self._examples(task, "hold_out"), self._infos[task].kind
        try:
            values = store.task_values(plan, self._schedule.blocks["hold_out"][task])
        except KeyError as error:
            raise StudyError(f"{self._run_dir}: its {SCORES_FILE} lacks the winner's") from error
        if kind.n_values(len(examples)) == len(examples):
            examples, values = examples[:limit], values[:limit]
        return examples, kind.score(values)

    def _compare(self, task: str, part: Part, examples: Sequence[int], ours: float) -> Comparison:
        found = self._theirs[task].score(task, examples)
        theirs = self._infos[task].kind.score(found.values)
        n_examples = len(examples)
        rounding = _ROUNDING[self._dtype]
        if self._dtype != torch.float32:
            rounding = max(rounding, 1 / n_examples)
        return Comparison(task, part, n_examples, ours, theirs, rounding, found.notes)


def _check(run_dir: Path, study: Study, results: Results, *, has_tasks: bool) -> None:
    if not has_tasks:
        raise StudyError(
            f"{run_dir}: no task of the study is lm-eval's; there is nothing to verify"
        )
    if study.spec.scoring == "int8":
        raise StudyError(
            f"{run_dir}: the report's scores are those of the model in int8 (scoring: int8), and "
            "the saved model is not rounded; nothing to verify them by"
        )
    if not (run_dir / MODEL_DIR).is_dir():
        raise StudyError(f"{run_dir}: there is no {MODEL_DIR}/; the study has not saved its model")
    if not is_saved(run_dir / MODEL_DIR, results.merge_plan):
        raise StudyError(
            f"{run_dir / MODEL_DIR}: is not the model of {results.winner}, which the report calls "
            "saved; a run was stopped before that: the same `searchmerge run` saves it"
        )
