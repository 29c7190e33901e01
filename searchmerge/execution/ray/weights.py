"""A merged model's tensors, one by one, from the worker that merges them."""

from collections.abc import Iterator
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from torch import Tensor

from searchmerge.errors import SearchMergeError, WorkerError
from searchmerge.execution.ray.cluster import short
from searchmerge.plan import MergePlan


def weights_of(
    actor: Any, plan: MergePlan, dtype: torch.dtype, timeout_s: float
) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a merged model by name, on the CPU; each is asked for in turn.

    Args:
        actor: Of a :class:`~searchmerge.execution.ray.actor.RayWorker` that has nothing to do.
        plan: How they are merged.
        dtype: Of those that are floating-point.
        timeout_s: Seconds that it may take to give the next one.

    Raises:
        WorkerError: If the worker is lost, or gives none in time.
        SearchMergeError: What it met as it merged.
    """
    try:
        _answer(actor.begin_merging.remote(plan, dtype), timeout_s)
        while (weight := _answer(actor.next_weight.remote(), timeout_s)) is not None:
            yield weight
    except GetTimeoutError as error:
        raise WorkerError(
            f"a worker gave no tensor within {timeout_s:g} s; ray.loading_deadline of the config "
            "says how long it may take"
        ) from error


def _answer(asked: Any, timeout_s: float) -> Any:
    """Return what a worker answers.

    Raises:
        WorkerError: If it does not.
        GetTimeoutError: If it does not in time.
        SearchMergeError: If it answered with an error.
    """
    try:
        answer = ray.get(asked, timeout=timeout_s)
    except GetTimeoutError:
        raise
    except RayTaskError as error:
        raise WorkerError(f"a worker failed as it merged: {short(error)}") from error
    except RayError as error:
        raise WorkerError(f"a worker was lost as it merged: {short(error)}") from error
    if isinstance(answer, SearchMergeError):
        raise answer
    return answer
