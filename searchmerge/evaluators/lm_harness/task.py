"""One lm-eval task: loaded, prompted and tokenised once, scored again and again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import Tensor

from searchmerge.errors import SpecError
from searchmerge.evaluators.evaluator import Answer, LossKind, Origin, TaskInfo
from searchmerge.evaluators.lm_harness.asking import ask, log_likelihood_of
from searchmerge.evaluators.lm_harness.catalogue import Leaf
from searchmerge.evaluators.lm_harness.choices import length_by
from searchmerge.evaluators.lm_harness.generation_keys import draws_answers
from searchmerge.evaluators.lm_harness.grading import TaskGrades
from searchmerge.evaluators.lm_harness.keys import LmTask
from searchmerge.evaluators.lm_harness.loading import explained, split_of, task_errors
from searchmerge.evaluators.lm_harness.losses import TaskLosses
from searchmerge.evaluators.lm_harness.metrics import TaskMetrics
from searchmerge.evaluators.lm_harness.requests import TaskRequests
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

    Attributes:
        spec: What the study says of it.
        leaf: The task in lm-eval.
        metrics: What is read in its answers.
        requests: What the model is asked.
        info: What a search knows of it.

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
        self.metrics = TaskMetrics(name, spec, task)
        self._documents = self._positions()
        self.requests = TaskRequests(name, task, self._documents, fewshot_seed, prompting)
        decides, others = self.metrics.decides, self.metrics.others
        self._losses = TaskLosses(task, decides.name, is_chat=self.is_chat)
        self._grades = TaskGrades(task, decides.name, self._losses, self.metrics.choices)
        self.info = TaskInfo(
            n_examples=len(self._documents),
            metric=decides.name,
            kind=Mean() if decides.is_mean else Whole(),
            other_metrics=tuple(other.label for other in others),
            keeps_answers=bool(others) or spec.answers == "keep",
            reading_keys=_READING_KEYS[self._generates],
            losses=self._losses.kinds,
            origins=(Origin(self._data(), self._documents),),
        )

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
    def source(self) -> str:
        """Return what its examples are drawn from, for messages."""
        return f"split {split_of(self.leaf, self.spec.split, 'split')!r}"

    @property
    def is_chat(self) -> bool:
        """Whether prompts are turns of a chat template."""
        return self.requests.is_chat

    def prompts(self, example: int) -> tuple[str, ...]:
        """Return the text of each request of an example, its continuation left out."""
        return tuple(str(request.args[0]) for request in self.requests.of([example])[0])

    def score(self, lm: Any, examples: Sequence[int]) -> tuple[float, ...]:
        """Return one score per example, or one in all, higher is better."""
        requests = self.requests.of(examples)
        ask(lm, [request for group in requests for request in group], self._name)
        return self.scores(requests)

    def scores(self, requests: Sequence[Sequence[Any]]) -> tuple[float, ...]:
        """Return the scores of requests that are answered, those of each example."""
        if self.metrics.decides.is_mean:  # grades count beside no other score
            self._grades.note(requests)
        return self.metrics.scores(requests)

    def loss(self, lm: Any, examples: Sequence[int]) -> Tensor:
        """Return the loss of each example; see :class:`TaskLosses`."""
        with explained(self._name, f"find the right answers of its task {self.lm_name!r}"):
            return self._losses.loss(lm, self.requests.of(examples))

    def log_probabilities(self, lm: Any, examples: Sequence[int]) -> list[Tensor]:
        """Return the log-probabilities of each example's choices."""
        return self._losses.log_probabilities(lm, self.requests.of(examples))

    def answers(self, examples: Sequence[int]) -> tuple[Answer, ...]:
        """Return what the model said to examples when they were last scored."""
        requests = self.requests.of(examples)
        self.metrics.read(self.metrics.others, requests)
        with explained(self._name, f"compute metrics of its task {self.lm_name!r}"):
            return tuple(map(self._answer, examples, requests))

    def grades(self, lm: Any, examples: Sequence[int]) -> tuple[float, ...]:
        """Return how clearly examples were answered when they were last scored."""
        with explained(self._name, f"grade the answers of its task {self.lm_name!r}"):
            return self._grades(lm, self.requests.of(examples))

    def _answer(self, example: int, requests: Sequence[Any]) -> Answer:
        metrics = self.metrics
        if self._generates:
            said = [text for request in requests for text in request.resps]
            read = [request.filtered_resps[metrics.decides.filter] for request in requests]
        else:
            likelihoods = self._likelihoods(requests)
            said = [f"{text} ({likelihood:.3f})" for text, likelihood in likelihoods]
            read = self._likeliest(requests[0].doc, likelihoods)
        return Answer(
            example,
            {m.label: m.sign * float(metrics.value(requests, m)) for m in metrics.others},
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
                log_likelihood_of(request.resps[0]),
            )
            for request in requests
            if of_choices or request.args[:-1] == requests[0].args[:-1]
        ]

    def _likeliest(self, doc: Any, likelihoods: Sequence[tuple[str, float]]) -> list[str]:
        """Return the choice that the metric takes for the answer; none where nothing is chosen."""
        if len(likelihoods) < 2:
            return []
        length, choices = length_by(self.metrics.decides.name), [text for text, _ in likelihoods]
        if self._task.OUTPUT_TYPE == "multiple_choice":
            choices = self._task.doc_to_choice(doc)
        pairs = zip(likelihoods, choices, strict=False)
        [text, _], _ = max(pairs, key=lambda pair: pair[0][1] / length(pair[1]))
        return [text]

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
