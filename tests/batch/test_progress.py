"""What is shown of a job."""

import io
import sys

from kivi_jax.batch.progress import LINE_SECONDS, Progress


def test_lines_now_and_then(capsys):
    now = [0.0]
    progress = Progress(100, 20, 1, 8, clock=lambda: now[0])
    progress.update(done=1, tokens=500)
    now[0] = LINE_SECONDS - 1
    progress.update(running=8)
    assert capsys.readouterr().err == ""
    now[0] = LINE_SECONDS
    progress.update(done=3, failed=1, tokens=2500, running=7)
    line = "24 of 100 lines done, 2 failed, 100 tokens/s, 7 of 8 slots in use, 0:09:30 left\n"
    assert capsys.readouterr().err == line
    progress.update(running=7)
    now[0] = 2 * LINE_SECONDS
    progress.update(tokens=600, running=7)
    assert ", 20 tokens/s, 7 of 8 slots in use, 0:19:00 left\n" in capsys.readouterr().err
    progress.close()
    assert (progress.done, progress.failed, progress.tokens) == (24, 2, 3600)


def test_time_left_is_unknown_at_first(capsys):
    now = [0.0]
    progress = Progress(100, 20, 0, 8, clock=lambda: now[0])
    now[0] = LINE_SECONDS
    progress.update(running=8)
    assert capsys.readouterr().err.endswith("time left unknown\n")


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    now, terminal = [0.0], Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(100, 20, 1, 8, clock=lambda: now[0])
    now[0] = 5.0
    progress.update(done=4, tokens=50, running=7)
    progress.close()
    assert "24/100" in terminal.getvalue()
    assert "1 failed, 10 tokens/s, 7 of 8 slots in use" in terminal.getvalue()
    assert "lines done" not in terminal.getvalue()


def test_without_a_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    now = [0.0]
    progress = Progress(100, 20, 1, 8, clock=lambda: now[0])
    now[0] = LINE_SECONDS
    progress.update(done=1, running=1)
    progress.close()
