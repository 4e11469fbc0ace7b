"""How far a job is: a bar on a terminal, else a line now and then."""

import datetime
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from kivi_jax.progress import progress_disabled

BAR_SECONDS = 2.0
LINE_SECONDS = 30.0


class Progress:
    """Shows lines done and failed, tokens a second, slots in use and the time left.

    Args:
        total: lines there are.
        done, failed: lines that have a result from before, and those of them that are errors.
        slots: of the engine.

    Attributes:
        done, failed: lines that have a result by now, and those of them that are errors.
        tokens: generated since the start.
    """

    def __init__(
        self, total: int, done: int, failed: int, slots: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.done, self.failed, self.tokens = done, failed, 0
        self._total, self._begun, self._slots, self._clock = total, done, slots, clock
        self._start = self._shown = clock()
        self._shown_tokens = 0
        self._bar = tqdm(total=total, initial=done, unit="line", leave=False, disable=progress_disabled())

    def update(self, done: int = 0, failed: int = 0, tokens: int = 0, running: int | None = None) -> None:
        """Adds to what is done and generated; shows it from time to time if told how many slots are `running`."""
        self.done += done
        self.failed += failed
        self.tokens += tokens
        self._bar.update(done)
        passed = self._clock() - self._shown
        if running is None or passed < (LINE_SECONDS if self._bar.disable else BAR_SECONDS):
            return
        speed = (self.tokens - self._shown_tokens) / passed
        state = f"{self.failed} failed, {speed:,.0f} tokens/s, {running} of {self._slots} slots in use"
        self._bar.set_postfix_str(state)
        if self._bar.disable and sys.stderr is not None:
            line = f"{self.done} of {self._total} lines done, {state}, {self._left()}"
            print(line, file=sys.stderr, flush=True)
        self._shown, self._shown_tokens = self._clock(), self.tokens

    def _left(self) -> str:
        finished = self.done - self._begun
        if not finished:
            return "time left unknown"
        seconds = (self._clock() - self._start) * (self._total - self.done) / finished
        return f"{datetime.timedelta(seconds=round(seconds))} left"

    def close(self) -> None:
        self._bar.close()
