"""SIGTERM and Ctrl-C ask for an orderly end; they do not interrupt the work in the middle."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | int | None
"""What `signal.signal` takes and gives back."""


class Stopped(Exception):
    """Raised where the work can be left: the state can be saved now."""


class StopSignals:
    """While active, the first SIGTERM or SIGINT is only noted; a second one does what it always does.

    Attributes:
        received: the signal, or None.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Handler] = {}

    def check(self) -> None:
        """To be called where the work can be left.

        Raises:
            Stopped: a signal has come.
        """
        if self.received is not None:
            raise Stopped

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()


def leave_signals_to_parent(_: int) -> None:
    """For a loader's workers: a Ctrl-C reaches all processes of a terminal, and the parent still wants its batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
