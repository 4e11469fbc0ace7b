"""How a job is asked to stop."""

import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """Within it, a first SIGTERM or Ctrl-C is only noted, so that what is finished gets written; a second one kills.

    Attributes:
        received: the number of the signal, or None.
    """

    received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # others may not handle signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for handled in self._before:
            signal.signal(handled, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
