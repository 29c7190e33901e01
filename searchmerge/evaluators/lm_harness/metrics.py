"""What is read in the answers to a task of lm-eval's, by its filters and metrics."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.lm_harness.asking import document_of, log_likelihood_of
from searchmerge.evaluators.lm_harness.choices import OF_LIKELIEST, Choices
from searchmerge.evaluators.lm_harness.keys import LmTask
from searchmerge.evaluators.lm_harness.loading import explained


@dataclass(frozen=True)
class Metric:
    """A metric of a task's.

    Attributes:
        name: In lm-eval.
        filter: Of the answers that it is of.
        label: What reports call it: with its filter, where that is not the task's first.
        sign: What makes higher better.
        aggregate: Makes a score of its values.
    """

    name: str
    filter: str
    label: str
    sign: float
    aggregate: Callable[..., Any]

    @property
    def is_mean(self) -> bool:
        """Whether the score is the mean over examples."""
        from lm_eval.api.registry import get_aggregation

        return self.aggregate in (get_aggregation("mean"), np.mean)


class TaskMetrics:
    """The metrics of one task that a study asks for.

    Args:
        name: The study's name of the task.
        spec: What the study says of it.
        task: lm-eval's task object.

    Attributes:
        decides: The metric whose values are the scores.
        others: Those that are told beside it, each a mean over examples.
        choices: The choices of its documents, where it has some.

    Raises:
        SpecError: If the task lacks one or its filter, or another is no mean over examples.
    """

    def __init__(self, name: str, spec: LmTask, task: Any) -> None:
        self._name = name
        self._task = task
        self._lm_name = str(task.config.task)
        self._filters = _filters(task)
        self._goes_by_likeliest = _goes_by_likeliest(task)
        self.choices = Choices(task)
        self._values: dict[tuple[str, int, int], Any] = {}  # by what is likeliest
        self.decides, *self.others = self._chosen(spec)

    def _chosen(self, spec: LmTask) -> list[Metric]:
        """Return the metric that decides, and the others."""
        where, metrics = f"tasks.{self._name}", self._task.aggregation()
        found = []
        for asked, answer_filter in spec.metrics_and_filters():
            metric = _choice(f"{where}.metric", asked, list(metrics))
            chosen = _choice(f"{where}.filter", answer_filter, list(self._filters))
            label = metric if chosen == next(iter(self._filters)) else f"{metric},{chosen}"
            sign = 1.0 if self._task.higher_is_better().get(metric, True) else -1.0
            found.append(Metric(metric, chosen, label, sign, metrics[metric]))
        for other in found[1:]:
            if not other.is_mean:
                raise SpecError(
                    f"{where}.metric: {other.name!r} of {self._lm_name!r} is no mean over "
                    "examples, so that it can decide, but not be reported beside another"
                )
        return found

    def read(self, metrics: Iterable[Metric], requests: Sequence[Sequence[Any]]) -> None:
        """Apply the filters that metrics are of to what was answered."""
        for name in dict.fromkeys(metric.filter for metric in metrics):
            with explained(self._name, f"apply filter {name!r} of its task {self._lm_name!r}"):
                self._filters[name].apply([request for group in requests for request in group])

    def value(self, requests: Sequence[Any], metric: Metric) -> Any:
        """Return a metric of one example, whose answers were read for it."""
        answers = [request.filtered_resps[metric.filter] for request in requests]
        likeliest = self._likeliest(requests[0], answers, metric)
        if likeliest is None:
            return self._computed(requests[0].doc, answers, metric)
        key = metric.name, requests[0].doc_id, likeliest
        if key not in self._values:
            self._values[key] = self._computed(requests[0].doc, answers, metric)
        return self._values[key]

    def _computed(self, doc: Any, answers: Sequence[Any], metric: Metric) -> Any:
        metrics = self._task.process_results(doc, answers)
        if metric.name not in metrics:
            raise SpecError(
                f"tasks.{self._name}: lm-eval's {self._lm_name!r} gave no metric "
                f"{metric.name!r} for an example (it gave: {', '.join(metrics)})"
            )
        return metrics[metric.name]

    def _likeliest(self, request: Any, answers: Sequence[Any], metric: Metric) -> int | None:
        """Return the choice that alone decides a metric of an example; ``None`` where none does.

        lm-eval takes several times as long to compute a metric as it takes to find that choice, so
        it computes it once for each.
        """
        if not self._goes_by_likeliest or metric.name not in OF_LIKELIEST:
            return None
        texts, lengths = self.choices.texts(request), self.choices.lengths(request, metric.name)
        if not all(texts):  # lm-eval divides by 0
            return None
        if len(lengths) != len(answers) or not all(isinstance(a, tuple) for a in answers):
            return None
        values = [log_likelihood_of(a) / n for a, n in zip(answers, lengths, strict=True)]
        return values.index(max(values))

    def scores(self, requests: Sequence[Sequence[Any]]) -> tuple[float, ...]:
        """Return the scores of requests that are answered, higher is better.

        Args:
            requests: Of each example.

        Raises:
            EvaluationError: If a score is not finite.
        """
        decides = self.decides
        self.read([decides], requests)
        with explained(self._name, f"compute {decides.name!r} of its task {self._lm_name!r}"):
            scores = self.aggregated([self.value(group, decides) for group in requests])
        for place, score in enumerate(scores):
            if not math.isfinite(score):
                which = document_of(requests[place][0]) if decides.is_mean else "all examples"
                raise EvaluationError(
                    f"task {self._name!r}, {which}: {decides.name} is {score}, not a finite number"
                )
        return scores

    def aggregated(self, values: Sequence[Any]) -> tuple[float, ...]:
        """Return the scores that come of the metric's values of examples, higher is better."""
        decides = self.decides
        values = values if decides.is_mean else [decides.aggregate(values)]
        return tuple(decides.sign * float(value) for value in values)


def _goes_by_likeliest(task: Any) -> bool:
    """Return whether lm-eval itself reads a task's answers, and these are choices."""
    from lm_eval.api.task import ConfigurableTask

    reads = getattr(task.process_results, "__func__", None) is ConfigurableTask.process_results
    own = callable(task.config.process_results)
    return reads and not own and task.OUTPUT_TYPE == "multiple_choice"


def _choice(key: str, asked: str | None, names: Sequence[str]) -> str:
    """Return ``asked``, or the first name if nothing was asked for."""
    if asked is None:
        return names[0]
    if asked not in names:
        raise SpecError(f"{key}: no {asked!r} in the task (it has: {', '.join(names)})")
    return asked


def _filters(task: Any) -> dict[str, Any]:
    """Return the task's filter pipelines by name, made of its own configuration."""
    from lm_eval.filters import build_filter_ensemble

    pipelines = task.config.filter_list or [
        {"name": "none", "filter": [{"function": "take_first"}]}
    ]
    return {
        pipeline["name"]: build_filter_ensemble(
            pipeline["name"],
            [
                (step["function"], {k: v for k, v in step.items() if k != "function"})
                for step in pipeline["filter"]
            ],
        )
        for pipeline in pipelines
    }
