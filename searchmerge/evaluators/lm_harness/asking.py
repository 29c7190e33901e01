"""Asking the model all requests of lm-eval's at once, and refusing what is not finite."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.causal.stopping import NonFiniteLogits


def ask(lm: Any, requests: Sequence[Any], name: str) -> None:
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


def document_of(request: Any) -> str:
    """Return which document of which task of lm-eval's a request is of, for messages."""
    return f"document {request.doc_id} of {request.task_name!r}"


def log_likelihood_of(given: Any) -> float:
    """Return the log-likelihood of an answer, which may say beside it whether it is greedy."""
    return float(given[0] if isinstance(given, tuple) else given)


def _check_finite(name: str, requests: Sequence[Any], answers: Sequence[Any]) -> None:
    values = [log_likelihood_of(given) for given in answers]
    if all(map(math.isfinite, values)):
        return
    place = next(i for i, value in enumerate(values) if not math.isfinite(value))
    what = f"a log-likelihood of {values[place]}, which is not finite"
    raise _not_finite(name, requests[place], what)


def _not_finite(name: str, request: Any, what: str) -> EvaluationError:
    return EvaluationError(f"task {name!r}, {document_of(request)}: the model gave {what}")
