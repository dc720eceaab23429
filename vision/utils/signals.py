"""SIGTERM and Ctrl-C ask for an orderly end; they do not interrupt the work in the middle."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

from vision.distributed.context import World

Handler = Callable[[int, FrameType | None], object] | int | None
"""What `signal.signal` takes and gives back."""


class Stopped(Exception):
    """Raised where the work can be left: the state can be saved now.

    Attributes:
        signal: what has come, to this process or to another.
    """

    def __init__(self, number: int):
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


class StopSignals:
    """While active, the first SIGTERM or SIGINT is only noted; a second one does what it always does.

    Of several processes all stop if one is asked to. There a second signal is ignored: torchrun passes on a Ctrl-C
    that the terminal has given to every process already.

    Attributes:
        received: the signal, or None.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World()
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Handler] = {}

    def check(self) -> None:
        """To be called where the work can be left, by all processes.

        Raises:
            Stopped: a signal has come to one of them.
        """
        if number := self.world.max(self.received or 0):
            raise Stopped(number)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if self.world.size == 1:
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
