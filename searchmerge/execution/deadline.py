"""How long a round may take before its worker counts as hung."""

from typing import Literal

Work = Literal["round", "gradient"]
"""What a worker may be at."""

FIRST_S = 3600.0
LEAST_S = 300.0
FACTOR = 10.0


class Deadline:
    """The seconds that one round of a job, or one gradient, may take.

    Where none are given: ``FACTOR`` times the longest round so far, and no less than
    ``LEAST_S``; ``FIRST_S`` until a round was seen, since the first one may compile and measure.

    Args:
        seconds: A fixed number, more than 0; ``None`` to derive it.
    """

    def __init__(self, seconds: float | None) -> None:
        self._fixed = seconds
        self._longest: float | None = None

    def saw(self, seconds: float) -> None:
        """Take note that a round took ``seconds``."""
        self._longest = max(self._longest or 0.0, seconds)

    @property
    def seconds(self) -> float:
        """How long a round may take now."""
        if self._fixed is not None:
            return self._fixed
        return FIRST_S if self._longest is None else max(LEAST_S, FACTOR * self._longest)

    def __str__(self) -> str:
        origin = "" if self._fixed is not None else ", derived; set ray.deadline in the config"
        return f"its deadline ({self.seconds:g} s{origin})"


class Deadlines:
    """The deadlines of several nodes: a slow one is not measured by a fast one.

    Nor is one kind of work by another: a gradient may take many times what a round takes.

    Args:
        seconds: A fixed number for all, more than 0; ``None`` to derive one for each.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._deadlines: dict[tuple[str, Work], Deadline] = {}

    def at(self, node: str, work: Work = "round") -> Deadline:
        """Return the deadline of the workers on a node at a kind of work."""
        return self._deadlines.setdefault((node, work), Deadline(self._seconds))
