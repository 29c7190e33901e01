"""The first signal stops a run cleanly, the second at once."""

import signal
import subprocess
import sys

import pytest

from searchmerge.interrupts import SIGNALS, Stopped, stopped_by_signals


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_stops_what_runs_and_handlers_are_put_back(number):
    before = [signal.getsignal(one) for one in SIGNALS]
    cleaned = []
    with pytest.raises(Stopped) as stopped, stopped_by_signals():
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(True)
    assert stopped.value.number == number
    assert cleaned
    assert [signal.getsignal(one) for one in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_ends_the_process_at_once(number):
    code = (
        "import signal\n"
        "from searchmerge.interrupts import stopped_by_signals\n"
        "with stopped_by_signals():\n"
        "    try:\n"
        f"        signal.raise_signal({int(number)})\n"
        "    finally:\n"
        f"        signal.raise_signal({int(number)})\n"
        "        print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -number
    assert done.stdout == ""
