"""The first signal is noted, the second kills."""

import signal
import subprocess
import sys
import threading

import pytest

from kivi_jax.batch.signals import StopSignals

PROGRAM = """
import signal, sys
from kivi_jax.batch.signals import StopSignals
with StopSignals() as stop:
    signal.raise_signal(int(sys.argv[1]))
    print(stop.received, flush=True)
    signal.raise_signal(int(sys.argv[2]))
    print("alive")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_noted(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.received is None
        signal.raise_signal(number)
        assert stop.received == number
        assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_kills(second):
    command = [sys.executable, "-c", PROGRAM, str(int(signal.SIGTERM)), str(int(second))]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-second, f"{int(signal.SIGTERM)}\n")


def test_other_threads_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with StopSignals() as stop:
            seen.append((stop.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
