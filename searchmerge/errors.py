"""Every error searchmerge raises on purpose; anything else that escapes is a bug."""


def printable(text: str) -> str:
    """Return text in one line, with an escape in place of each character that cannot be shown."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class SearchMergeError(Exception):
    """Base class, so that a caller can catch everything raised on purpose."""

    def __str__(self) -> str:
        """Return the message in one line; users' names in it move no cursor and colour nothing."""
        return printable(super().__str__())


class SpecError(SearchMergeError, ValueError):
    """A study, config or plan names something that does not exist, or a value out of range."""


class CheckpointError(SearchMergeError, ValueError):
    """The checkpoints cannot be merged with one another, or cannot be read or written."""


class EvaluationError(SearchMergeError, RuntimeError):
    """A candidate could not be scored; the trial fails and the study goes on."""


class StudyError(SearchMergeError, RuntimeError):
    """A study cannot go on: changed since it began, already running, or every trial failed."""


class WorkerError(SearchMergeError, RuntimeError):
    """A worker could not do what another process may do as well."""


class DeviceFault(SearchMergeError, RuntimeError):
    """A device failed beneath a candidate; nothing more can be computed in this process."""
