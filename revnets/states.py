"""Look at every state while a forward goes on, whatever memory mode it runs in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from torch import Tensor, nn

from revnets.engine.columns import ReversibleColumns


@contextmanager
def observed(columns: ReversibleColumns, note: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `note(t, x_t)` for each cell t as soon as it has run.

    The state comes with its graph, if there is one. It lives on only as long as `note` keeps it. Leave the context
    before `backward`, whose replays call cells as well.

    Args:
        columns: run once inside of the context.
        note: may not change the state.
    """
    index = count()

    def hook(_module: nn.Module, _inputs: Any, state: Tensor) -> None:
        note(next(index), state)

    cells = dict.fromkeys(columns.flat())  # a set: one cell may serve several columns
    handles = [cell.register_forward_hook(hook) for cell in cells]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
