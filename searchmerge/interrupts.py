"""Stopping a run by a signal: the first ends it cleanly, the second at once."""

import contextlib
import signal
import threading
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


class _State(threading.local):
    """What a thread was asked, which may be the main one alone, and whether it waits with it."""

    received: int | None = None  # the first signal since :func:`stopped_by_signals` began
    is_due: bool = False  # whether it came while it was held back, and nothing was raised yet
    is_held: bool = False


_state = _State()


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise ``Stopped`` at the first Ctrl-C or SIGTERM; the next one ends the process at once.

    Must be entered in the main thread.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        _state.received = number
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        if _state.is_held:
            _state.is_due = True
        else:
            raise KeyboardInterrupt

    before = {signum: signal.signal(signum, stop) for signum in SIGNALS}
    try:
        yield
    except KeyboardInterrupt:  # what waits in C++ raises one of its own in place of ours
        raise Stopped(_state.received or signal.SIGINT) from None
    finally:
        _state.received, _state.is_due = None, False
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let what is done here come to its end before a signal stops the run.

    A write to a database that is broken off where it stands may keep the database locked, or be
    swallowed by what it is done in.
    """
    was_held, _state.is_held = _state.is_held, True
    try:
        yield
    finally:
        _state.is_held = was_held
    if _state.is_due and not was_held:
        _state.is_due = False
        raise KeyboardInterrupt


@contextlib.contextmanager
def let_through() -> Iterator[None]:
    """Let a signal interrupt what is done here, inside of :func:`held_back`, at any moment.

    One that came before stops the run here at the latest: what Python raises for it is lost
    where it comes while an object is being deleted.
    """
    was_held, _state.is_held = _state.is_held, False
    try:
        if _state.received is not None:
            _state.is_due = False
            raise KeyboardInterrupt
        yield
    finally:
        _state.is_held = was_held
