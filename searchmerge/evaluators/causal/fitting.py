"""Batches that do not fit into a device's memory: smaller ones are run instead."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

_logger = logging.getLogger(__name__)

T = TypeVar("T")

_LEAST = 1 / 64
"""Of a usual batch: where less than that does not fit, smaller ones would not help."""


class Fitting:
    """What part of a usual batch fits into memory: halved whenever one does not.

    It stays so: what did not fit once would not fit the next time. In 16-bit dtypes scores
    depend on the batches a little, which a line in the log says.
    """

    def __init__(self) -> None:
        self._part = 1.0

    def run(self, work: Callable[[float], T]) -> T:
        """Return what ``work`` returns, given the part of a usual batch that it may run at once.

        Args:
            work: Does everything anew each time that it is called.

        Raises:
            torch.OutOfMemoryError: If the smallest batches do not fit either.
        """
        while True:
            try:
                return work(self._part)
            except torch.OutOfMemoryError:
                if self._part <= _LEAST:
                    raise
            self._part /= 2
            _logger.warning(
                "a batch does not fit into the device's memory: going on with 1/%d of it",
                round(1 / self._part),
            )
            gc.collect()  # out of the handler: the error held what its frames held
            torch.cuda.empty_cache()  # does nothing where there is no GPU
