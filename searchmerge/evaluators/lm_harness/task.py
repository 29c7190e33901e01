"""One lm-eval task: loaded, prompted and tokenised once, scored again and again."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from torch import Tensor

from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.causal.decoding import NonFiniteLogits
from searchmerge.evaluators.evaluator import Answer, LossKind, Origin, TaskInfo
from searchmerge.evaluators.lm_harness.catalogue import Leaf
from searchmerge.evaluators.lm_harness.generation_keys import draws_answers
from searchmerge.evaluators.lm_harness.grading import TaskGrades
from searchmerge.evaluators.lm_harness.keys import LmTask
from searchmerge.evaluators.lm_harness.loading import explained, quiet, split_of, task_errors
from searchmerge.evaluators.lm_harness.losses import TaskLosses
from searchmerge.evaluators.score_kind import Mean, Whole
from searchmerge.wording import counted

_READING_KEYS = {
    True: ("chat_template", "filter", "generation"),
    False: ("chat_template", "num_fewshot", "metric"),
}
"""What decides how answers are read, where they are generated and where they are not."""

_TOLD_CHARACTERS = 100


class PreparedTask:
    """One task: its examples, its requests with every prompt, and how answers become scores.

    Args:
        name: The study's name of the task.
        spec: What the study says of it.
        leaf: The task in lm-eval.
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
        leaf: Leaf,
        task: Any,
        fewshot_seed: int,
        prompting: Mapping[str, Any],
    ) -> None:
        self._name = name
        self.spec = spec
        self.leaf = leaf
        self._task = task
        self._prompting = prompting
        self._filters = _filters(self._task)
        self._decides, *self._others = self._metrics()
        self._documents = self._positions()
        self._losses = TaskLosses(task, self.metric, is_chat=self.is_chat)
        self._grades = TaskGrades(task, self.metric, self._losses)
        self.info = TaskInfo(
            n_examples=len(self._documents),
            metric=self.metric,
            kind=Mean() if self._decides.is_mean else Whole(),
            other_metrics=tuple(other.label for other in self._others),
            keeps_answers=bool(self._others) or spec.answers == "keep",
            reading_keys=_READING_KEYS[self._generates],
            losses=self._losses.kinds,
            origins=(Origin(self._data(), self._documents),),
        )
        self._requests: dict[int, list[Any]] = {}
        self._is_rendered = False
        with explained(name, "set the seed of its few-shot examples"):
            task.set_fewshot_seed(fewshot_seed)

    def find_without_loss(self, kind: LossKind, lm: Any, config: Any) -> None:
        """Note which examples lack a loss, and that there is none where all of them do.

        Args:
            kind: Which loss.
            lm: Knows how texts are tokenised.
            config: The model's configuration, which tells its window; ``None`` if not known.
        """
        docs = self._task.eval_docs
        without = tuple(
            example
            for example, document in enumerate(self._documents)
            if not self._losses.has_loss(kind, docs[document], lm, config)
        )
        kinds = {*self._losses.kinds, kind}
        if len(without) == len(self._documents):
            kinds.remove(kind)
        losses = tuple(each for each in get_args(LossKind) if each in kinds)
        self.info = replace(self.info, losses=losses, without_loss=without)

    def _data(self) -> str:
        """Return which data its documents are: other tasks may have the same."""
        config = self._task.config
        place = ", ".join(filter(None, (config.dataset_path, config.dataset_name)))
        files = (config.dataset_kwargs or {}).get("data_files")
        made = "" if config.process_docs is None else f" as {self.lm_name!r} makes them"
        if files is not None:
            place = f"{place} files {files}"
        return f"{self.source} of {place or self.lm_name}{made}"

    def _metrics(self) -> "list[_Metric]":
        """Return the metric that decides, and the others.

        Raises:
            SpecError: If the task lacks one or its filter, or another is no mean over examples.
        """
        where, metrics = f"tasks.{self._name}", self._task.aggregation()
        found = []
        for asked, answer_filter in self.spec.metrics_and_filters():
            metric = _chosen(f"{where}.metric", asked, list(metrics))
            chosen = _chosen(f"{where}.filter", answer_filter, list(self._filters))
            label = metric if chosen == next(iter(self._filters)) else f"{metric},{chosen}"
            sign = 1.0 if self._task.higher_is_better().get(metric, True) else -1.0
            found.append(_Metric(metric, chosen, label, sign, metrics[metric]))
        for other in found[1:]:
            if not other.is_mean:
                raise SpecError(
                    f"{where}.metric: {other.name!r} of {self.lm_name!r} is no mean over "
                    "examples, so that it can decide, but not be reported beside another"
                )
        return found

    @property
    def metric(self) -> str:
        """Return the metric that decides."""
        return self._decides.name

    @property
    def filter(self) -> str:
        """Return the filter of answers that the metric is of."""
        return self._decides.filter

    @property
    def lm_name(self) -> str:
        """Return the task's name in lm-eval."""
        return str(self._task.config.task)

    def parts(self, examples: Sequence[int]) -> "list[TaskPart]":
        """Return which documents of which task of lm-eval's the examples are: one task's."""
        documents = tuple(self._documents[example] for example in examples)
        return [TaskPart(self, documents, tuple(range(len(examples))))]

    def _positions(self) -> tuple[int, ...]:
        """Return where in the split each example stands.

        Raises:
            SpecError: If the study names one that is not there.
        """
        n_documents = len(self._task.eval_docs)
        samples = self.spec.samples
        if not isinstance(samples, tuple):
            return tuple(range(n_documents))
        if (last := max(samples)) >= n_documents:
            raise SpecError(
                f"tasks.{self._name}.samples: there is no position {last}; "
                f"the split {self.spec.split!r} has "
                f"{counted(n_documents, 'example')}, 0 to {n_documents - 1}"
            )
        return samples

    @property
    def n_fewshot(self) -> int:
        """Return how many examples are shown before the question."""
        return int(self._task.config.num_fewshot or 0)

    @property
    def samples_answers(self) -> bool:
        """Whether answers are drawn at random."""
        return draws_answers(self.generation or {})

    @property
    def generation(self) -> dict[str, Any] | None:
        """Return the arguments of generation; ``None`` where nothing is generated."""
        return dict(self._task.config.generation_kwargs or {}) if self._generates else None

    @property
    def _generates(self) -> bool:
        return bool(self._task.OUTPUT_TYPE == "generate_until")

    @property
    def _draws_in_order(self) -> bool:
        """Whether each prompt's few-shot examples depend on the prompts made before it."""
        config = self._task.config
        fewshot = config.fewshot_config
        sampler = getattr(fewshot, "sampler", None) or (fewshot or {}).get("sampler")
        return bool(config.num_fewshot) and sampler != "first_n"

    def prompted_with(self, documents: Sequence[int]) -> list[int]:
        """Return the documents whose prompts have to be made, in this order, for those of some."""
        return sorted(self._documents if self._draws_in_order else documents)

    def requests(self, examples: Sequence[int]) -> list[list[Any]]:
        """Return the requests of examples, made when they are first asked for.

        Where few-shot examples are drawn in order, those of all examples are made at once, as
        lm-eval does; else of these alone, so that a large task costs what is scored of it.
        """
        documents = [self._documents[example] for example in examples]
        missing = [document for document in documents if document not in self._requests]
        if missing:
            with explained(self._name, f"make prompts of its task {self.lm_name!r}"), quiet():
                for document in self.prompted_with(missing):
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
    def source(self) -> str:
        """Return what its examples are drawn from, for messages."""
        return f"split {split_of(self.leaf, self.spec.split, 'split')!r}"

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

    def loss(self, lm: Any, examples: Sequence[int]) -> Tensor:
        """Return the loss of each example; see :class:`TaskLosses`."""
        with explained(self._name, f"find the right answers of its task {self.lm_name!r}"):
            return self._losses.loss(lm, self.requests(examples))

    def log_probabilities(self, lm: Any, examples: Sequence[int]) -> list[Tensor]:
        """Return the log-probabilities of each example's choices."""
        return self._losses.log_probabilities(lm, self.requests(examples))

    def scores(
        self, requests: Sequence[Sequence[Any]], examples: Sequence[int]
    ) -> tuple[float, ...]:
        """Return the scores of requests that are answered.

        Args:
            requests: Of each example.
            examples: Which they are, for messages.
        """
        if self._decides.is_mean:  # grades count beside no other score
            self._grades.note(requests)
        self._read_answers(self.filter, requests)
        with explained(self._name, f"compute {self.metric!r} of its task {self.lm_name!r}"):
            values = [self._value(group, self._decides) for group in requests]
            scores = list(self.aggregated(values))
        for place, score in enumerate(scores):
            if not math.isfinite(score):
                is_mean = self._decides.is_mean
                which = f"example {examples[place]}" if is_mean else "all examples"
                raise EvaluationError(
                    f"task {self._name!r}, {which}: {self.metric} is {score}, not a finite number"
                )
        return tuple(scores)

    def _read_answers(self, name: str, requests: Sequence[Sequence[Any]]) -> None:
        """Apply one of the task's filters to what was answered."""
        with explained(self._name, f"apply filter {name!r} of its task {self.lm_name!r}"):
            self._filters[name].apply([request for group in requests for request in group])

    def aggregated(self, values: Sequence[Any]) -> tuple[float, ...]:
        """Return the scores that come of the metric's values of examples, higher is better."""
        decides = self._decides
        values = values if decides.is_mean else [decides.aggregate(values)]
        return tuple(decides.sign * float(value) for value in values)

    def _value(self, requests: Sequence[Any], metric: "_Metric") -> Any:
        """Return a metric of one example."""
        answers = [request.filtered_resps[metric.filter] for request in requests]
        metrics = self._task.process_results(requests[0].doc, answers)
        if metric.name not in metrics:
            raise SpecError(
                f"tasks.{self._name}: lm-eval's {self.lm_name!r} gave no metric "
                f"{metric.name!r} for an example (it gave: {', '.join(metrics)})"
            )
        return metrics[metric.name]

    def answers(self, examples: Sequence[int]) -> tuple[Answer, ...]:
        """Return what the model said to examples when they were last scored."""
        requests = self.requests(examples)
        for name in {metric.filter: None for metric in self._others}:
            self._read_answers(name, requests)
        with explained(self._name, f"compute metrics of its task {self.lm_name!r}"):
            return tuple(map(self._answer, examples, requests))

    def grades(self, lm: Any, examples: Sequence[int]) -> tuple[float, ...]:
        """Return how clearly examples were answered when they were last scored."""
        with explained(self._name, f"grade the answers of its task {self.lm_name!r}"):
            return self._grades(lm, self.requests(examples))

    def _answer(self, example: int, requests: Sequence[Any]) -> Answer:
        if self._generates:
            said = [text for request in requests for text in request.resps]
            read = [request.filtered_resps[self.filter] for request in requests]
        else:
            likelihoods = self._likelihoods(requests)
            said = [f"{text} ({likelihood:.3f})" for text, likelihood in likelihoods]
            read = [max(likelihoods, key=lambda pair: pair[1])[0]] if len(likelihoods) > 1 else []
        return Answer(
            example,
            {m.label: m.sign * float(self._value(requests, m)) for m in self._others},
            *self._asked(requests[0].doc),
            said=tuple(map(str, said)),
            read=tuple(map(str, read)),
        )

    def _likelihoods(self, requests: Sequence[Any]) -> list[tuple[str, float]]:
        """Return each continuation of the question and its log-likelihood.

        Where choices are put into the question, as in Winogrande, they are told by its end.
        """
        of_choices = getattr(self._task, "multiple_input", 0)
        return [
            (
                "".join(request.args)[-_TOLD_CHARACTERS:] if of_choices else request.args[-1],
                _first(request.resps[0]),
            )
            for request in requests
            if of_choices or request.args[:-1] == requests[0].args[:-1]
        ]

    def _asked(self, doc: Any) -> tuple[str, str]:
        """Return a document's question and right answer; nothing where a task cannot tell."""
        task = self._task
        try:
            question, target = task.doc_to_text(doc), task.doc_to_target(doc)
            if isinstance(target, int) and task.config.doc_to_choice is not None:
                target = task.doc_to_choice(doc)[target]
        except task_errors():
            return "", ""
        return question if isinstance(question, str) else "", str(target)


@dataclass(frozen=True)
class _Metric:
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
        return _is_mean(self.aggregate)


@dataclass(frozen=True)
class TaskPart:
    """Which documents of a task of lm-eval's some examples of a study's task are.

    Attributes:
        task: The task of lm-eval's.
        documents: Positions in the split that is scored.
        places: Where each stands among the examples.
    """

    task: PreparedTask
    documents: tuple[int, ...]
    places: tuple[int, ...]


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


def _first(given: Any) -> float:
    """Return the log-likelihood of an answer."""
    return float(given[0] if isinstance(given, tuple) else given)


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
