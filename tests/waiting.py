"""Waiting for what another process does."""

import time


def wait_for(condition, seconds=60):
    """Return what ``condition`` does once that is true."""
    give_up = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up, "it did not come to pass"
        time.sleep(0.01)
    return found
