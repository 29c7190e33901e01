"""What a study tells a person while it runs."""

from collections.abc import Mapping
from typing import Protocol

from searchmerge.search.trials import TrialRecord


class Observer(Protocol):
    """Shows a person what happens."""

    def phase(self, title: str, total: int | None, done: int = 0) -> None:
        """A phase of ``total`` steps begins, ``done`` of which are behind it."""
        ...

    def step(self, name: str, scores: Mapping[str, float]) -> None:
        """A reference or a candidate for confirmation is scored."""
        ...

    def trial(self, record: TrialRecord, *, is_best: bool) -> None:
        """A trial is finished; ``is_best`` where it is better than all that were before it."""
        ...
