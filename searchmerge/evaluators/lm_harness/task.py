"""One lm-eval task: loaded, prompted and tokenised once, scored again and again."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.causal.generation import NonFiniteLogits
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.evaluators.lm_harness.keys import LmTask
from searchmerge.evaluators.lm_harness.loading import explained, quiet
from searchmerge.evaluators.score_kind import Mean, Whole


class PreparedTask:
    """One task: its examples, its requests with every prompt, and how answers become scores.

    Args:
        name: The study's name of the task.
        spec: What the study says of it.
        task: lm-eval's task object, from :func:`load_task`.
        fewshot_seed: Seed of the choice of few-shot examples.
        prompting: Arguments of lm-eval's that say how prompts are made.

    Raises:
        SpecError: If there is no such metric, filter or sample.
    """

    def __init__(
        self,
        name: str,
        spec: LmTask,
        task: Any,
        fewshot_seed: int,
        prompting: Mapping[str, Any],
    ) -> None:
        self._name = name
        self._spec = spec
        self._task = task
        self._prompting = prompting
        metrics = list(self._task.aggregation())
        metric, answer_filter = spec.metric_and_filter
        self._metric = _chosen(f"tasks.{name}.metric", metric, metrics)
        self._filters = _filters(self._task)
        self._filter = _chosen(f"tasks.{name}.filter", answer_filter, list(self._filters))
        self._documents = self._positions()
        higher = self._task.higher_is_better().get(self._metric, True)
        self._sign = 1.0 if higher else -1.0
        self._aggregate = self._task.aggregation()[self._metric]
        self._is_mean = _is_mean(self._aggregate)
        self.info = TaskInfo(
            n_examples=len(self._documents),
            metric=self._metric,
            kind=Mean() if self._is_mean else Whole(),
        )
        self._requests: dict[int, list[Any]] = {}
        self._is_rendered = False
        with explained(name, "set the seed of its few-shot examples"):
            task.set_fewshot_seed(fewshot_seed)

    @property
    def lm_name(self) -> str:
        """Return the task's name in lm-eval."""
        return str(self._task.config.task)

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

    @property
    def _draws_in_order(self) -> bool:
        """Whether each prompt's few-shot examples depend on the prompts made before it."""
        config = self._task.config
        fewshot = config.fewshot_config
        sampler = getattr(fewshot, "sampler", None) or (fewshot or {}).get("sampler")
        return bool(config.num_fewshot) and sampler != "first_n"

    def requests(self, examples: Sequence[int]) -> list[list[Any]]:
        """Return the requests of examples, made when they are first asked for.

        Where few-shot examples are drawn in order, those of all examples are made at once, as
        lm-eval does; else of these alone, so that a large task costs what is scored of it.
        """
        documents = [self._documents[example] for example in examples]
        missing = [document for document in documents if document not in self._requests]
        if missing:
            if self._draws_in_order:
                missing = sorted(self._documents)
            with explained(self._name, f"make prompts of its task {self.lm_name!r}"), quiet():
                for document in missing:
                    self._requests[document] = self._make_requests(document)
            if not self._is_rendered:
                for template in ("doc_to_text", "doc_to_target", "doc_to_choice"):
                    _render_once(self._task, template)
                self._is_rendered = True
        return [self._requests[document] for document in documents]

    def _make_requests(self, document: int) -> list[Any]:
        task, chat = self._task, self._prompting
        doc = task.eval_docs[document]
        context = task.fewshot_context(
            doc,
            num_fewshot=task.config.num_fewshot or 0,
            gen_prefix=task.doc_to_prefix(doc),
            **{key: value for key, value in chat.items() if key != "tokenizer_name"},
        )
        requests = task.construct_requests(
            doc=doc,
            ctx=context,
            metadata=(task.config.task, document, task.config.repeats),
            apply_chat_template=chat.get("apply_chat_template", False),
            chat_template=chat.get("chat_template"),
        )
        requests = requests if isinstance(requests, list) else [requests]
        return sorted(requests, key=lambda request: request.idx)

    @property
    def is_chat(self) -> bool:
        """Whether prompts are turns of a chat template."""
        return bool(self._prompting.get("apply_chat_template"))

    def prompts(self, example: int) -> tuple[str, ...]:
        """Return the text of each request of an example, its continuation left out."""
        return tuple(str(request.args[0]) for request in self.requests([example])[0])

    def score(self, lm: Any, examples: Sequence[int]) -> tuple[float, ...]:
        """Return one score per example, or one in all, higher is better."""
        requests = self.requests(examples)
        answer(lm, [request for group in requests for request in group], self._name)
        return self.scores(requests, examples)

    def scores(
        self, requests: Sequence[Sequence[Any]], examples: Sequence[int]
    ) -> tuple[float, ...]:
        """Return the scores of requests that are answered.

        Args:
            requests: Of each example.
            examples: Which they are, for messages.
        """
        self._filters[self._filter].apply([request for group in requests for request in group])
        with explained(self._name, f"compute {self._metric!r} of its task {self.lm_name!r}"):
            values = [self._value(group) for group in requests]
            if not self._is_mean:
                values = [self._aggregate(values)]
            scores = [self._sign * float(value) for value in values]
        for place, score in enumerate(scores):
            if not math.isfinite(score):
                which = f"example {examples[place]}" if self._is_mean else "all examples"
                raise EvaluationError(
                    f"task {self._name!r}, {which}: {self._metric} is {score}, not a finite number"
                )
        return tuple(scores)

    def _value(self, requests: Sequence[Any]) -> Any:
        """Return the metric of one example."""
        answers = [request.filtered_resps[self._filter] for request in requests]
        metrics = self._task.process_results(requests[0].doc, answers)
        if self._metric not in metrics:
            raise SpecError(
                f"tasks.{self._name}: lm-eval's {self.lm_name!r} gave no metric "
                f"{self._metric!r} for an example (it gave: {', '.join(metrics)})"
            )
        return metrics[self._metric]


def answer(lm: Any, requests: Sequence[Any], name: str) -> None:
    """Ask the model, all requests of a type at once, and leave its answers in the requests.

    Args:
        lm: A :class:`ResidentLM`.
        requests: Of one task or of several.
        name: The study's name of the task, for messages.

    Raises:
        EvaluationError: If a log-likelihood or the logits of a generation are not finite.
    """
    by_type: dict[str, list[Any]] = defaultdict(list)
    for request in requests:
        request.resps, request.filtered_resps = [], {}
        by_type[request.request_type] += [request] * (request.repeats or 1)
    for kind, asked in by_type.items():
        try:
            answers = getattr(lm, kind)(asked)
        except NonFiniteLogits as error:
            what = "logits that are not finite"
            raise _not_finite(name, asked[error.row], what) from error
        except SpecError as error:
            raise SpecError(f"tasks.{name}: {error}") from error
        if kind != "generate_until":
            _check_finite(name, asked, answers)
        for request, given in zip(asked, answers, strict=True):
            request.resps.append(given)


def _check_finite(name: str, requests: Sequence[Any], answers: Sequence[Any]) -> None:
    values = [given[0] if isinstance(given, tuple) else given for given in answers]
    if all(map(math.isfinite, values)):
        return
    place = next(i for i, value in enumerate(values) if not math.isfinite(value))
    what = f"a log-likelihood of {values[place]}, which is not finite"
    raise _not_finite(name, requests[place], what)


def _not_finite(name: str, request: Any, what: str) -> EvaluationError:
    return EvaluationError(f"task {name!r}, example {request.doc_id}: the model gave {what}")


def _chosen(key: str, asked: str | None, names: Sequence[str]) -> str:
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
