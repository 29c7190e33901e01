"""Stopping a run by a signal: the first ends it cleanly, the second at once."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise ``Stopped`` at the first Ctrl-C or SIGTERM; the next one ends the process at once.

    Must be entered in the main thread.
    """
    received: int = signal.SIGINT

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = {signum: signal.signal(signum, stop) for signum in SIGNALS}
    try:
        yield
    except KeyboardInterrupt:  # what waits in C++ raises one of its own in place of ours
        raise Stopped(received) from None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
