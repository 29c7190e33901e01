"""The first signal stops a run cleanly, the second at once."""

import signal
import subprocess
import sys
import threading

import pytest

from searchmerge.interrupts import SIGNALS, Stopped, held_back, let_through, stopped_by_signals


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


def test_a_signal_waits_for_what_must_come_to_its_end():
    done = []
    with pytest.raises(Stopped) as stopped, stopped_by_signals():
        with held_back():
            with held_back():
                signal.raise_signal(signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        done.append("behind")
    assert stopped.value.number == signal.SIGTERM
    assert done == ["inner", "outer"]


@pytest.mark.parametrize("comes_before", [True, False])
def test_what_waits_is_interrupted_within_what_must_come_to_its_end(comes_before):
    done = []
    with pytest.raises(Stopped), stopped_by_signals(), held_back():
        if comes_before:
            signal.raise_signal(signal.SIGINT)
        with let_through():
            done.append("waiting")
            signal.raise_signal(signal.SIGINT)
            done.append("waited")
        done.append("behind")
    assert done == ([] if comes_before else ["waiting"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_comes_while_an_object_is_deleted_is_not_lost():
    class Deleted:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    done = []
    with pytest.raises(Stopped), stopped_by_signals():
        Deleted()
        done.append("swallowed")
        with let_through():
            done.append("went on")
    assert done == ["swallowed"]


def test_cleaning_up_after_a_signal_is_not_stopped_again():
    cleaned = []
    with pytest.raises(Stopped), stopped_by_signals():
        try:
            with held_back():
                signal.raise_signal(signal.SIGTERM)
        finally:
            with held_back():
                cleaned.append(True)
            cleaned.append(True)
    assert cleaned == [True, True]


def test_what_another_thread_holds_back_is_its_own():
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with held_back():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    done = []
    with pytest.raises(Stopped), stopped_by_signals():
        thread.start()
        inside.wait()
        try:
            signal.raise_signal(signal.SIGTERM)
            done.append("went on")
        finally:
            leave.set()
            thread.join()
    assert not done
