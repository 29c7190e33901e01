"""How clearly examples of lm-eval's tasks were answered, beside what the metric says of them."""

import math
from collections.abc import Sequence
from typing import Any

from searchmerge.evaluators.lm_harness.asking import log_likelihood_of
from searchmerge.evaluators.lm_harness.choices import OF_LIKELIEST, Choices
from searchmerge.evaluators.lm_harness.loading import task_errors
from searchmerge.evaluators.lm_harness.losses import TaskLosses

_MOST_TOKENS = 64
"""A target of more tokens is one of many ways to be right, and says little of the others."""

_LEAST = 1e-6  # how far below 0 the log-likelihood of what is certain is taken for


class TaskGrades:
    """Grades the examples of one task of lm-eval's, above 0 where they are answered right.

    - ``multiple_choice``: by how much the right choice was the likelier one: its log-likelihood
      minus that of the likeliest other, both as the metric divides them.
    - ``loglikelihood``: the log-odds of the continuation.
    - ``generate_until``: the log-odds of the target in the answer's place, where every document
      has one that is short. That takes a pass of its own, over prompt and target.

    Args:
        task: lm-eval's task object.
        metric: The metric that decides.
        losses: Know the target of each document.
        choices: The choices of each.
    """

    def __init__(self, task: Any, metric: str, losses: TaskLosses, choices: Choices) -> None:
        self._task = task
        self._metric = metric
        self._losses = losses
        self._waiting: dict[int, Sequence[Any]] = {}
        self._targets: dict[int, Any] = {}  # requests, made when they are first asked for
        self._log_odds: dict[int, float | None] = {}
        self._choices = choices
        self._rights: dict[int, list[int]] = {}  # places of the right choices
        self._has_targets = task.OUTPUT_TYPE == "generate_until" and "labels" in losses.kinds

    def note(self, requests: Sequence[Sequence[Any]]) -> None:
        """Take note that requests of some examples were answered anew."""
        if self._has_targets:
            self._waiting |= {group[0].doc_id: group for group in requests}

    def __call__(self, lm: Any, requests: Sequence[Sequence[Any]]) -> tuple[float, ...]:
        """Return a grade of each example; none where not all of them can be graded.

        Args:
            lm: A :class:`ResidentLM`, with the model that answered.
            requests: Of each example, answered.
        """
        kind = self._task.OUTPUT_TYPE
        graded: list[float | None] = []
        if kind == "multiple_choice" and self._metric in OF_LIKELIEST:
            graded = [self._margin(group) for group in requests]
        elif kind == "loglikelihood" and self._metric == "acc":
            graded = [log_odds(group[0].resps[0][0]) for group in requests]
        elif kind == "generate_until":
            self._ask(lm)
            graded = [self._log_odds.get(group[0].doc_id) for group in requests]
        known = tuple(grade for grade in graded if grade is not None)
        return known if len(known) == len(requests) else ()

    def _ask(self, lm: Any) -> None:
        """Find the log-odds of the targets of all that were answered since, at once."""
        waiting, self._waiting = self._waiting, {}
        for place, (request, *_) in waiting.items():
            if place not in self._targets:
                self._targets[place] = self._target_of(lm, request)
        self._log_odds |= dict.fromkeys(waiting)
        asked = {place: self._targets[place] for place in waiting}
        if None in asked.values():  # a task counts by its metric alone unless all have grades
            self._has_targets = False
        if not asked or not self._has_targets:
            return
        answers = lm.loglikelihood(list(asked.values()))
        for place, (log_likelihood, _) in zip(asked, answers, strict=True):
            if math.isfinite(log_likelihood):
                self._log_odds[place] = log_odds(log_likelihood)

    def _target_of(self, lm: Any, request: Any) -> Any:
        """Return the request for an example's target; ``None`` where it cannot be graded by it.

        It may be none, or long, or have no token of its own after the prompt's last.
        """
        from lm_eval.api.instance import Instance

        context = request.args[0]
        try:
            target = self._losses.target(request.doc)
        except task_errors():  # only the grade is in need of it
            return None
        most = min(_MOST_TOKENS, lm.max_length)
        if not target or not 0 < lm.n_tokens(context, target) <= most:
            return None
        return Instance("loglikelihood", request.doc, (context, target), 0)

    def _margin(self, requests: Sequence[Any]) -> float | None:
        """Return an example's grade; ``None`` where there is no right choice, or no other."""
        first = requests[0]
        if first.doc_id not in self._rights:
            texts = self._choices.texts(first)
            self._rights[first.doc_id] = self._losses.right(first.doc, texts)
        rights = self._rights[first.doc_id]
        lengths = self._choices.lengths(first, self._metric)
        values: dict[bool, list[float]] = {True: [], False: []}
        for i, (length, request) in enumerate(zip(lengths, requests, strict=False)):
            values[i in rights].append(log_likelihood_of(request.resps[0]) / length)
        if not (values[True] and values[False]):
            return None
        return max(values[True]) - max(values[False])


def log_odds(log_probability: float) -> float:
    r"""Return :math:`\log p - \log(1 - p)`; of a p so near 1 that they are the same, about 14."""
    below = min(log_probability, -_LEAST)
    return below - math.log(-math.expm1(below))
