"""What can be differentiated of lm-eval's tasks: losses, and distributions over choices."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from searchmerge.errors import EvaluationError
from searchmerge.evaluators.evaluator import LossKind
from searchmerge.evaluators.lm_harness.asking import document_of
from searchmerge.evaluators.lm_harness.choices import length_by
from searchmerge.evaluators.lm_harness.loading import task_errors
from searchmerge.wording import counted


class TaskLosses:
    """The losses of one task of lm-eval's.

    - ``multiple_choice``: cross-entropy over the choices' log-likelihoods, divided as the task's
      metric divides them; of several right choices, of any of them.
    - ``loglikelihood``: the negative log-likelihood of a token of the continuation, on average.
    - ``loglikelihood_rolling``: the same of the text.
    - ``generate_until``: the same of the target, the first of several, where each document has
      one. What is generated is not looked at.

    What comes next at the tokens of the continuation, the text or the target has a distribution
    too; where a document has no target, at the first token of an answer. So all have the losses
    that need no label.

    Args:
        task: lm-eval's task object.
        metric: The metric that decides.
        is_chat: Whether the answer is a turn of a chat template.
    """

    def __init__(self, task: Any, metric: str, *, is_chat: bool) -> None:
        self._task = task
        self._length = length_by(metric)
        self._is_chat = is_chat
        self.kinds: tuple[LossKind, ...] = self._kinds()

    def _kinds(self) -> tuple[LossKind, ...]:
        """Return which losses there are, seen by the first document."""
        unlabelled: tuple[LossKind, ...] = ("entropy", "agreement")
        has_labels = self._is_answered(self._task.eval_docs[0])
        return ("labels", *unlabelled) if has_labels else unlabelled

    def _is_answered(self, doc: Any) -> bool:
        """Return whether a document says what is right."""
        output_type = self._task.OUTPUT_TYPE
        if output_type in ("loglikelihood", "loglikelihood_rolling"):
            return True
        try:
            if output_type == "multiple_choice":
                return bool(self.right(doc, self._task.doc_to_choice(doc)))
            return bool(self.target(doc))
        except task_errors():
            return False

    def has_loss(self, kind: LossKind, doc: Any, lm: Any, config: Any) -> bool:
        """Return whether a document has a loss, as far as can be seen without its prompt.

        Args:
            kind: Which loss.
            doc: The document.
            lm: Knows how texts are tokenised.
            config: The model's configuration, which tells its window; ``None`` if not known.
        """
        output_type = self._task.OUTPUT_TYPE
        if output_type == "loglikelihood_rolling":
            return bool(lm.fits(self._task.doc_to_target(doc), None))
        if kind != "labels":
            return True
        if not self._is_answered(doc):
            return False
        return output_type != "generate_until" or bool(lm.fits(self.target(doc), config))

    def loss(self, lm: Any, requests: Sequence[Sequence[Any]]) -> Tensor:
        """Return the loss of each example, given its requests.

        Raises:
            EvaluationError: If a document has no answer that can be learnt from.
        """
        if self._task.OUTPUT_TYPE == "multiple_choice":
            return self._loss_of_choices(self._of_choices(lm, requests), requests)
        if self._task.OUTPUT_TYPE == "loglikelihood_rolling":
            totals, n_tokens = lm.rolling_log_likelihoods([group[0].args[0] for group in requests])
        elif self._task.OUTPUT_TYPE == "loglikelihood":
            totals, n_tokens = lm.log_likelihoods([group[0].args[:2] for group in requests])
        else:
            texts = [(group[0].args[0], self._learnt(lm, group[0])) for group in requests]
            totals, n_tokens = lm.log_likelihoods(texts)
        loss: Tensor = -(totals / n_tokens)
        return loss

    def log_probabilities(self, lm: Any, requests: Sequence[Sequence[Any]]) -> list[Tensor]:
        """Return each example's log-probabilities, given its requests.

        Of its choices, ``(n_choices,)``; else of what comes next, ``(n_tokens, vocabulary)``.
        """
        kind = self._task.OUTPUT_TYPE
        if kind == "multiple_choice":
            return self._of_choices(lm, requests)
        given: list[Tensor]
        if kind == "loglikelihood_rolling":
            given = lm.next_tokens_of_texts([group[0].args[0] for group in requests])
        elif kind == "loglikelihood":
            given = lm.next_tokens([group[0].args[:2] for group in requests])
        else:
            texts = [(group[0].args[0], self._answer(lm, group[0])) for group in requests]
            given = lm.next_tokens(texts)
        return given

    def _learnt(self, lm: Any, request: Any) -> str:
        """Return the target of a request, which has some tokens within the model's window."""
        try:
            target = self.target(request.doc)
        except task_errors() as error:
            reason = f"{type(error).__name__}: {error}"
            raise EvaluationError(f"{document_of(request)} has no target: {reason}") from error
        n_tokens = lm.n_tokens(request.args[0], target) if target else 0
        if not 0 < n_tokens <= lm.max_length:
            raise EvaluationError(
                f"{document_of(request)} has a target of {counted(n_tokens, 'token')}, "
                f"{target[:80]!r}; to learn from it takes 1 to {lm.max_length}, the model's window"
            )
        return target

    def _answer(self, lm: Any, request: Any) -> str:
        """Return the target of a request, empty where there is none that the model can read."""
        try:
            target = self.target(request.doc)
        except task_errors():  # it is not needed
            return ""
        n_tokens = lm.n_tokens(request.args[0], target) if target else 0
        return target if 0 < n_tokens <= lm.max_length else ""

    def _of_choices(self, lm: Any, requests: Sequence[Sequence[Any]]) -> list[Tensor]:
        texts, lengths, counts = [], [], []
        for group in requests:
            choices = self._task.doc_to_choice(group[0].doc)
            texts += [request.args[:2] for request in group[: len(choices)]]
            lengths += [self._length(choice) for choice in choices]
            counts.append(len(choices))
        totals, _ = lm.log_likelihoods(texts)
        normalised = totals / totals.new_tensor(lengths)
        return [of_example.log_softmax(0) for of_example in torch.split(normalised, counts)]

    def _loss_of_choices(
        self, log_probabilities: Sequence[Tensor], requests: Sequence[Sequence[Any]]
    ) -> Tensor:
        losses = []
        for of_example, group in zip(log_probabilities, requests, strict=True):
            doc = group[0].doc
            right = self.right(doc, self._task.doc_to_choice(doc))
            if not right:
                raise EvaluationError(
                    f"{document_of(group[0])} has no right answer among its choices to learn from"
                )
            losses.append(-of_example[right].logsumexp(0))
        return torch.stack(losses)

    def right(self, doc: Any, choices: Sequence[str]) -> list[int]:
        """Return the places of the right choices of a document."""
        in_text = getattr(self._task, "multiple_input", 0)
        right = self._task.doc_to_text(doc) if in_text else self._task.doc_to_target(doc)
        right = right if isinstance(right, list) else [right]
        return [i for i, choice in enumerate(choices) if i in right or choice in right]

    def target(self, doc: Any) -> str:
        """Return a document's answer as it follows its prompt; empty where there is none."""
        config = self._task.config
        if isinstance(config.doc_to_target, int):  # a number that stands for nothing
            return ""
        target = self._task.doc_to_target(doc)
        if isinstance(target, list):
            target = target[0] if target else ""
        if isinstance(target, int) and config.doc_to_choice is not None:
            target = self._task.doc_to_choice(doc)[target]
        text = "" if target is None else str(target)
        follows = self._is_chat or config.gen_prefix
        return text if follows or not text else f"{config.target_delimiter}{text}"
