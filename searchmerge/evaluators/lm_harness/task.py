"""One lm-eval task: loaded, prompted and tokenised once, scored again and again."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.causal.generation import NonFiniteLogits
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.evaluators.lm_harness.catalogue import (
    Catalogue,
    LmTask,
    explained,
    load_task,
    quiet,
)


class PreparedTask:
    """One task: its examples, its requests with every prompt, and how answers become scores.

    Args:
        name: The study's name of the task.
        spec: What the study says of it.
        catalogue: Where lm-eval's tasks are found.
        fewshot_seed: Seed of the choice of few-shot examples.
        prompting: Arguments of lm-eval's that say how prompts are made.

    Raises:
        SpecError: If there is no such task, split, metric or filter.
    """

    def __init__(
        self,
        name: str,
        spec: LmTask,
        catalogue: Catalogue,
        fewshot_seed: int,
        prompting: Mapping[str, Any],
    ) -> None:
        self._name = name
        self._spec = spec
        self._seed = fewshot_seed
        self._prompting = prompting
        self._task = load_task(name, spec, catalogue)
        metrics = list(self._task.aggregation())
        metric, answer_filter = spec.metric_and_filter
        self._metric = _chosen(f"tasks.{name}.metric", metric, metrics)
        self._filters = _filters(self._task)
        self._filter = _chosen(f"tasks.{name}.filter", answer_filter, list(self._filters))
        self._documents = self._positions()
        higher = self._task.higher_is_better().get(self._metric, True)
        self._sign = 1.0 if higher else -1.0
        self._aggregate = self._task.aggregation()[self._metric]
        self.info = TaskInfo(
            n_examples=len(self._documents),
            mean=_is_mean(self._aggregate),
            metric=self._metric,
        )

    def _positions(self) -> tuple[int, ...]:
        """Return where in the split each example stands.

        Raises:
            SpecError: If the study names one that is not there.
        """
        n_documents = len(self._task.eval_docs)
        if self._spec.samples is None:
            return tuple(range(n_documents))
        if (last := max(self._spec.samples)) >= n_documents:
            raise SpecError(
                f"tasks.{self._name}.samples: there is no position {last}; the split "
                f"{self._spec.split!r} has {n_documents} examples, 0 to {n_documents - 1}"
            )
        return self._spec.samples

    @cached_property
    def _requests(self) -> list[list[Any]]:
        """The requests of every example, made at first use: few-shot draws are in order."""
        task = self._task
        task.set_fewshot_seed(self._seed)
        with explained(self._name, f"make prompts of its task {self._spec.task!r}"), quiet():
            task.build_all_requests(
                samples=None if self._spec.samples is None else list(self._documents),
                **self._prompting,
            )
        requests: dict[int, list[Any]] = {document: [] for document in self._documents}
        in_order = sorted(self._documents)  # lm-eval numbers those that it was asked for
        for request in sorted(task.instances, key=lambda request: request.idx):
            request.doc_id = in_order[request.doc_id]
            requests[request.doc_id].append(request)
        for template in ("doc_to_text", "doc_to_target", "doc_to_choice"):
            _render_once(task, template)
        return [requests[document] for document in self._documents]

    @property
    def is_chat(self) -> bool:
        """Whether prompts are turns of a chat template."""
        return bool(self._prompting.get("apply_chat_template"))

    def prompts(self, example: int) -> tuple[str, ...]:
        """Return the text of each request of an example, its continuation left out."""
        return tuple(str(request.args[0]) for request in self._requests[example])

    def score(self, lm: Any, examples: Sequence[int]) -> tuple[float, ...]:
        """Return one score per example, or one in all, higher is better."""
        requests = [self._requests[example] for example in examples]
        self._answer(lm, [request for group in requests for request in group])
        with explained(self._name, f"compute {self._metric!r} of its task {self._spec.task!r}"):
            values = [self._value(group) for group in requests]
            if not self.info.mean:
                values = [self._aggregate(values)]
            scores = [self._sign * float(value) for value in values]
        for place, score in enumerate(scores):
            if not math.isfinite(score):
                which = f"example {examples[place]}" if self.info.mean else "all examples"
                raise EvaluationError(
                    f"task {self._name!r}, {which}: {self._metric} is {score}, not a finite number"
                )
        return tuple(scores)

    def _answer(self, lm: Any, requests: Sequence[Any]) -> None:
        """Ask the model, and leave its filtered answers in the requests."""
        by_type: dict[str, list[Any]] = defaultdict(list)
        for request in requests:
            request.resps, request.filtered_resps = [], {}
            by_type[request.request_type] += [request] * (request.repeats or 1)
        for kind, asked in by_type.items():
            try:
                answers = getattr(lm, kind)(asked)
            except NonFiniteLogits as error:
                raise self._not_finite(asked[error.row], "logits that are not finite") from error
            if kind != "generate_until":
                self._check_finite(asked, answers)
            for request, answer in zip(asked, answers, strict=True):
                request.resps.append(answer)
        self._filters[self._filter].apply(list(requests))

    def _check_finite(self, requests: Sequence[Any], answers: Sequence[Any]) -> None:
        values = [answer[0] if isinstance(answer, tuple) else answer for answer in answers]
        if all(map(math.isfinite, values)):
            return
        place = next(i for i, value in enumerate(values) if not math.isfinite(value))
        what = f"a log-likelihood of {values[place]}, which is not finite"
        raise self._not_finite(requests[place], what)

    def _not_finite(self, request: Any, what: str) -> EvaluationError:
        return EvaluationError(
            f"task {self._name!r}, example {request.doc_id}: the model gave {what}"
        )

    def _value(self, requests: Sequence[Any]) -> Any:
        """Return the metric of one example."""
        answers = [request.filtered_resps[self._filter] for request in requests]
        metrics = self._task.process_results(requests[0].doc, answers)
        if self._metric not in metrics:
            raise SpecError(
                f"tasks.{self._name}: lm-eval's {self._spec.task!r} gave no metric "
                f"{self._metric!r} for an example (it gave: {', '.join(metrics)})"
            )
        return metrics[self._metric]


def _chosen(key: str, asked: str | None, known: Sequence[str]) -> str:
    """Return ``asked``, or the first known name if nothing was asked for."""
    if asked is None:
        return known[0]
    if asked not in known:
        raise SpecError(f"{key}: no {asked!r} in the task (it has: {', '.join(known)})")
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


def _is_mean(aggregate: Callable[..., Any]) -> bool:
    from lm_eval.api.registry import get_aggregation

    return aggregate in (get_aggregation("mean"), np.mean)


def _render_once(task: Any, field: str) -> None:
    """Have a template of the task rendered once for each example; lm-eval compiles it each time.

    A task takes a function wherever it takes a template.
    """
    template = getattr(task.config, field, None)
    if not isinstance(template, str) or template in getattr(task, "features", ()):
        return
    render = getattr(task, field)
    rendered: dict[int, tuple[Any, Any]] = {}

    def look_up(doc: Any) -> Any:
        if id(doc) not in rendered:
            rendered[id(doc)] = (doc, render(doc, template))  # the document keeps its id
        return rendered[id(doc)][1]

    task.set_config(field, look_up)
