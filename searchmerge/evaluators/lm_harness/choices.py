"""The choices of an lm-eval task's documents, as its metrics compare them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

LENGTHS: Mapping[str, Callable[[str], float]] = {
    "acc_norm": lambda choice: float(len(choice) or 1),
    "acc_bytes": lambda choice: float(len(choice.encode()) or 1),
}
"""Metrics of choices to what they divide a choice's log-likelihood by; others by nothing."""

OF_LIKELIEST = ("acc", *LENGTHS)
"""Metrics that are 1 where the right choice is the likeliest, so divided."""


def length_by(metric: str) -> Callable[[str], float]:
    """Return what a metric divides a choice's log-likelihood by: a function of the choice."""
    return LENGTHS.get(metric, lambda choice: 1.0)


class Choices:
    """The choices of one task, read once for each document.

    Args:
        task: lm-eval's task object.
    """

    def __init__(self, task: Any) -> None:
        self._task = task
        self._texts: dict[int, Sequence[str]] = {}
        self._lengths: dict[tuple[str, int], list[float]] = {}

    def texts(self, request: Any) -> Sequence[str]:
        """Return the choices of the document that a request is of."""
        if request.doc_id not in self._texts:
            self._texts[request.doc_id] = self._task.doc_to_choice(request.doc)
        return self._texts[request.doc_id]

    def lengths(self, request: Any, metric: str) -> list[float]:
        """Return what a metric divides the log-likelihood of each of them by."""
        key = metric, request.doc_id
        if key not in self._lengths:
            self._lengths[key] = [length_by(metric)(text) for text in self.texts(request)]
        return self._lengths[key]
