"""Refinements side by side: what they ask is computed on whatever workers are free."""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from searchmerge.errors import EvaluationError
from searchmerge.execution.executor import Differentiated, Event, Executor, Failed, Finished, Lost
from searchmerge.execution.gradient import LossResult
from searchmerge.interrupts import held_back, let_through
from searchmerge.search.crashes import LostWorkers
from searchmerge.search.refine import Ask, Refined, Refinement

_logger = logging.getLogger(__name__)

_WAIT_S = 30.0


@dataclass(slots=True)
class _Going:
    """A refinement that waits for what it asked.

    Attributes:
        name: Of the plan that it refines.
        refinement: What is sent the answer.
        ask: What it asked.
        result: The answer, once it has come.
    """

    name: str
    refinement: Refinement
    ask: Ask
    result: LossResult | None = None


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A refinement did not come to its end: another run may do better.

    Attributes:
        reason: What it failed of.
    """

    reason: str


End = Refined | GivenUp | None
"""What a refinement proposes, ``None`` where that does not pay, or that it was given up."""


class Refiner:
    """Runs refinements on an executor, each of them as far as it goes.

    What a lost worker was asked goes to another. A refinement is told of a plan that has no
    finite loss, or kills its workers, and is given up where it cannot go on.

    Args:
        executor: Computes losses and gradients.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._numbers = itertools.count(1)
        self._live: dict[int, _Going] = {}
        self._waiting: deque[_Going] = deque()
        self._done: dict[str, End] = {}
        self._ended: Callable[[str, End], None] = lambda name, end: None
        self._lost = LostWorkers()

    def run(
        self,
        refinements: Mapping[str, Refinement],
        ended: Callable[[str, End], None] = lambda name, end: None,
        answered: Callable[[], None] = lambda: None,
    ) -> dict[str, End]:
        """Return what came of each refinement, by the name of the plan that it refines.

        Args:
            refinements: Name to refinement.
            ended: Called at the end of each with its name and what came of it.
            answered: Called whenever a refinement was told something.
        """
        self._done, self._ended = {}, ended
        try:
            with held_back():
                for name, refinement in reversed(list(refinements.items())):
                    self._ask(name, refinement, partial(next, refinement))
                while self._waiting or self._live:
                    self._fill()
                    with let_through():
                        event = self._executor.next_event(_WAIT_S)
                    self._handle(event)
                    answered()
        finally:
            for number in self._live:
                self._executor.stop(number)
            self._live.clear()
            self._waiting.clear()
        return {name: self._done[name] for name in refinements}

    def _ask(self, name: str, refinement: Refinement, go_on: Callable[[], Ask]) -> None:
        """Have the next question of a refinement wait for a worker, if it has one."""
        try:
            ask = go_on()
        except StopIteration as ended:
            self._end(name, ended.value)
        except EvaluationError as error:
            _logger.warning("%s cannot be refined: %s", name, error)
            self._end(name, GivenUp(str(error)))
        else:  # first, as the worker that is free now holds what this plan's gradient needs
            self._waiting.appendleft(_Going(name, refinement, ask))

    def _end(self, name: str, end: End) -> None:
        self._done[name] = end
        self._ended(name, end)

    def _fill(self) -> None:
        """Give every free worker what is asked next."""
        while self._waiting and self._executor.n_free:
            going, number = self._waiting.popleft(), next(self._numbers)
            self._lost.begin()
            self._live[number] = going
            self._executor.submit_gradient(number, *going.ask)

    def _handle(self, event: Event | None) -> None:
        """Do what follows from an event."""
        match event:
            case Differentiated(number, result) if number in self._live:
                self._live[number].result = result
            case Finished(number) if number in self._live:
                self._go_on(self._live.pop(number))
            case Failed(number, reason) if number in self._live:
                self._fail(self._live.pop(number), reason)
            case Lost(number) as lost if number in self._live:
                self._retry(self._live.pop(number), lost)

    def _go_on(self, going: _Going) -> None:
        """Send the answer, and have the next question wait for a worker."""
        if going.result is None:
            raise RuntimeError(f"a worker ended without the gradient of {going.name}")
        plan, _ = going.ask
        self._lost.end(plan.digest)
        self._ask(going.name, going.refinement, partial(going.refinement.send, going.result))

    def _retry(self, going: _Going, lost: Lost) -> None:
        plan, _ = going.ask
        n_lost = self._lost.lose(plan.digest, 0, blameless=lost.blameless)
        if self._lost.is_hopeless(plan.digest):
            self._fail(going, f"{lost.reason} ({n_lost} workers in a row)")
            return
        _logger.warning("refining %s lost its worker, and goes on: %s", going.name, lost.reason)
        self._waiting.append(going)

    def _fail(self, going: _Going, reason: str) -> None:
        """Tell a refinement that it gets no answer; it may know how to go on."""
        error = EvaluationError(reason)
        self._ask(going.name, going.refinement, partial(going.refinement.throw, error))
