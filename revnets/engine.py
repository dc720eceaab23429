"""The tape: records cells going forward, rebuilds their inputs and replays them going backward.

The forward runs under ordinary autograd. A recorded cell leaves no tensor in the graph: each one that autograd wants
to save is replaced by a ticket (tape, t, k). The first ticket of a cell that backward presents makes the tape

1. rebuild x_{t-m} = (x_t - F_t) / gamma_t and thereby move its window of m states one step down, and
2. replay the cell, which saves the same tensors in the same order; ticket k is honoured with the k-th of them.

The rules that keep this right:

- Rule 1. Nothing about a pass is stored on a module. Frames belong to a tape, a tape to one call of `run`; two
  forwards before one backward have two tapes.
- Rule 2. References go one way: graph -> ticket -> tape -> frames -> plain tensors. When the graph lets go of its
  tickets (after backward, or when it is dropped), everything goes by reference counting.
- Rule 3. The window only moves down. A ticket from above the window (a second backward, a double backward, a loss on
  an early tap after a loss at the end) makes the tape start again from the last window, which lives as long as it.
- Rule 4. A rebuilt state gets the strides of the original: with others, kernels take other paths and round otherwise.
- Rule 5. A replay runs in the surrounding of its forward (`replay.py`), under the same `requires_grad` of its reads,
  and must save what the forward saved: number, shape, strides and dtype are checked.
- Rule 6. What was changed in place after the forward cannot be trusted; versions are checked as autograd does.
- Rule 7. Tapes do not nest. Columns inside of a cell run plainly, and the replay of the cell brings back what they
  saved; a tape of their own would keep their window for every cell around them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revnets import lostbits
from revnets.cell import add, subtract
from revnets.graph import STEM, Graph, Node
from revnets.replay import ReplayError, Surrounding


class Memory(StrEnum):
    """How the state x_{t-m}, which cell t replaces, comes back in backward."""

    STORE = "store"  # autograd keeps it, and all that the cell saves: no replay
    RECOMPUTE = "recompute"  # the tape keeps it; the cell is replayed
    INVERT = "invert"  # rebuilt by the inverse alone; rounding errors add up
    EXACT = "exact"  # rebuilt by the inverse and the lost bits, bit for bit


class Ticket(NamedTuple):
    """What the graph holds in place of the k-th tensor that cell t saves."""

    tape: Tape
    t: int
    k: int


class Meta(NamedTuple):
    """What a replayed tensor must have in common with the one it stands for."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Meta:
        return cls(tensor.shape, tensor.stride(), tensor.dtype)


class Held(NamedTuple):
    """A detached state and the version at which the forward left it."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> Held:
        return cls(tensor.detach(), tensor._version)


class Frame:
    """One cell's call in one pass."""

    __slots__ = (
        *("node", "mode", "kept", "lost", "past_stride", "past_grad", "grad_reads"),
        *("surrounding", "metas", "saved"),
    )

    def __init__(self, node: Node, mode: Memory):
        self.node = node
        self.mode = mode
        self.kept: Held | None = None  # x_{t-m}, in store and recompute
        self.lost: lostbits.LostBits | None = None  # what the inverse misses of it, in exact
        self.past_stride: tuple[int, ...] = ()
        self.past_grad = False
        self.grad_reads: list[bool] = []
        self.surrounding: Surrounding | None = None
        self.metas: list[Meta] = []
        self.saved: dict[int, Held] = {}


class _Nesting(threading.local):
    """Is this thread in a cell whose saved tensors are tickets? (Rule 7)"""

    inside = False


_nesting = _Nesting()


@contextmanager
def _inside() -> Iterator[None]:
    before, _nesting.inside = _nesting.inside, True
    try:
        yield
    finally:
        _nesting.inside = before


def unpack(ticket: Ticket) -> Tensor:
    return ticket.tape.redeem(ticket.t, ticket.k)


class Tape:
    """What one pass keeps for its backward: the last window, the constants, and a frame a cell."""

    def __init__(self, graph: Graph, cells: Sequence[nn.Module], stem: Tensor, context: Mapping[str, Any]):
        self.graph = graph
        self.cells = cells
        self.stem = Held.of(stem)
        self.stem_grad = stem.requires_grad
        self.context = {name: _Constant.of(value) for name, value in context.items()}
        self.frames: list[Frame | None] = []
        self.last: dict[int, Held] = {}
        self.window: dict[int, Held] = {}
        self.cursor = -1  # the window holds x_cursor and the m - 1 states before it
        self.lock = threading.RLock()  # autograd runs one thread a device

    # ---------------------------------------------------------------- forward

    def record(self, node: Node, reads: list[Tensor], past: Tensor | None, mode: Memory, context: Any) -> Tensor:
        """Run a cell so that the graph keeps tickets in place of what it saves."""
        frame = Frame(node, mode)
        frame.grad_reads = [read.requires_grad for read in reads]
        versions = [read._version for read in reads]
        cell = self.cells[node.index]
        coupled: list[tuple[Tensor, int]] = []

        def couple(update: Tensor, gamma: Tensor | float) -> Tensor:
            state = _couple_forward(self._name(node), frame, past, update, gamma)
            coupled.append((state, state._version))
            return state

        def pack(tensor: Tensor) -> Ticket:
            frame.metas.append(Meta.of(tensor))
            return Ticket(self, node.index, len(frame.metas) - 1)

        call = partial(cell, *reads, couple=None if past is None else couple, **context)
        if mode is Memory.STORE:
            state = call()
        else:
            devices = frozenset(read.device for read in reads)
            with Surrounding.record(cell, devices) as frame.surrounding, saved_tensors_hooks(pack, unpack), _inside():
                state = call()
        if past is not None and not _is_unchanged(state, *coupled[0]):
            raise ReplayError(
                f"{self._name(node)} does not return the state that its coupling made; a forward hook on the cell, "
                "perhaps? What lies behind the coupling cannot be inverted: hook `cell.function` instead"
            )
        if [read._version for read in reads] != versions:
            raise ReplayError(
                f"{self._name(node)} changed one of its reads in place; other cells still need that state. "
                "Work on a copy, or use the out-of-place operation"
            )
        self.frames.append(frame)
        self._settle(node)
        return state

    def _settle(self, node: Node) -> None:
        """Cut the lost bits of the cell a column ago to length: their counts have long arrived from the device."""
        frame = self.frames[node.residual] if node.residual is not None else None
        if frame is not None and frame.lost is not None:
            frame.lost.settle()

    def skip(self) -> None:
        """A cell below everything that needs a gradient: nobody will ask for it."""
        self.frames.append(None)

    def close(self, states: Mapping[int, Tensor]) -> None:
        """End of the forward: hold the last m states, from which backward starts."""
        self.last = {index: Held.of(state) for index, state in states.items()}

    # --------------------------------------------------------------- backward

    def redeem(self, t: int, k: int) -> Tensor:
        """Honour a ticket: the k-th tensor that cell t saved."""
        frame = self.frames[t]
        with self.lock:
            if k not in frame.saved:
                self._move_to(t)
                self._replay(frame, collect=True)
            saved = frame.saved.pop(k)  # one use a pass; a second pass replays (Rule 3)
        return _trusted(saved, f"a tensor that {self._name(frame.node)} saved")

    def _move_to(self, index: int) -> None:
        if self.cursor < index:
            if self.cursor >= 0:
                self.frames[self.cursor].saved.clear()
            self.window, self.cursor = dict(self.last), len(self.frames) - 1
        while self.cursor > index:
            self._step_down()

    def _step_down(self) -> None:
        """Forget x_t, having made sure of x_{t-m}."""
        frame = self.frames[self.cursor]
        assert frame is not None  # the window never goes below the first cell that needs a gradient
        residual = frame.node.residual
        if residual is not None and residual not in self.window:
            if frame.kept is not None:
                self.window[residual] = frame.kept
            else:
                self._replay(frame, collect=False)
        frame.saved.clear()  # tickets that this backward did not need
        del self.window[self.cursor]
        self.cursor -= 1

    def _replay(self, frame: Frame, collect: bool) -> None:
        """Call the cell again on rebuilt reads; put x_{t-m} into the window and, if asked, collect what it saves."""
        node = frame.node
        saved: list[Held] = []

        def pack(tensor: Tensor) -> None:
            if collect:
                saved.append(Held.of(tensor))

        # Gradients are enabled even where nothing is collected: without them some modules take other kernels.
        couple = None if node.residual is None else partial(self._couple_replay, frame)
        with frame.surrounding.restored(), torch.enable_grad(), saved_tensors_hooks(pack, _never), _inside():
            reads = [self._read(read, grad) for read, grad in zip(node.reads, frame.grad_reads, strict=True)]
            context = {name: constant.fresh() for name, constant in self.context.items()}
            self.cells[node.index](*reads, couple=couple, **context)
        if collect:
            self._check(frame, saved)
            frame.saved = dict(enumerate(saved))

    def _couple_replay(self, frame: Frame, update: Tensor, gamma: Tensor | float) -> Tensor:
        """x_{t-m} from x_t, then x_t as in the forward, so that the product with gamma is saved again."""
        residual = frame.node.residual
        if residual in self.window:
            past = self._state(residual)
        elif frame.kept is not None:
            past = _trusted(frame.kept, f"the state of {self.graph.name(residual)}")
            self.window[residual] = frame.kept
        else:
            with torch.no_grad():
                past = subtract(self._state(frame.node.index), update.detach(), _detached(gamma))
                past = _with_stride(past, frame.past_stride)
                if frame.lost is not None:
                    lostbits.decode(past, frame.lost)
            self.window[residual] = Held.of(past)
        return add(past.detach().requires_grad_(frame.past_grad), update, gamma)

    def _read(self, index: int, grad: bool) -> Tensor:
        state = _trusted(self.stem, "the stem") if index == STEM else self._state(index)
        return state.detach().requires_grad_(grad)

    def _state(self, index: int) -> Tensor:
        return _trusted(self.window[index], f"the state of {self.graph.name(index)}")

    def _name(self, node: Node) -> str:
        return f"cell {self.graph.name(node.index)} ({type(self.cells[node.index]).__name__})"

    def _check(self, frame: Frame, saved: list[Held]) -> None:
        causes = (
            "Usual causes: the cell takes another path in its replay (it counts its calls, looks at the clock, at "
            "Python's or NumPy's random numbers or at global state), or its input changed in place"
        )
        if len(saved) != len(frame.metas):
            raise ReplayError(
                f"{self._name(frame.node)} saved {len(frame.metas)} tensors in its forward and {len(saved)} in its "
                f"replay. {causes}"
            )
        for k, (held, meta) in enumerate(zip(saved, frame.metas, strict=True)):
            now = Meta.of(held.tensor)
            if now != meta:
                raise ReplayError(
                    f"{self._name(frame.node)}: saved tensor {k} was {tuple(meta)} in the forward and is {tuple(now)} "
                    f"in the replay. {causes}"
                )
            if held.tensor._version != held.version:
                raise ReplayError(
                    f"{self._name(frame.node)}: saved tensor {k} of shape {tuple(now.shape)} is needed for the "
                    "gradient, but the cell changes it in place later on. Use the out-of-place operation"
                )


def _couple_plain(name: str, past: Tensor, update: Tensor, gamma: Tensor | float) -> Tensor:
    """x_t; nothing comes back."""
    if update.shape != past.shape:
        raise ValueError(
            f"{name} gives a tensor of shape {tuple(update.shape)}, but the state x_(t-m) that it is added to has "
            f"{tuple(past.shape)}; both must be equal"
        )
    return add(past, update, gamma)


def _couple_forward(name: str, frame: Frame, past: Tensor, update: Tensor, gamma: Tensor | float) -> Tensor:
    """x_t, and into the frame whatever its mode needs to come back to x_{t-m}."""
    state = _couple_plain(name, past, update, gamma)
    frame.past_stride, frame.past_grad = past.stride(), past.requires_grad
    if frame.mode in (Memory.STORE, Memory.RECOMPUTE):
        frame.kept = Held.of(past)
    elif frame.mode is Memory.EXACT:
        with torch.no_grad():
            rebuilt = _with_stride(subtract(state, update, gamma), past.stride())
            frame.lost = lostbits.encode(past.detach(), rebuilt)
    return state


class _Constant(NamedTuple):
    """An argument that every cell gets; a tensor is handed to replays without its graph."""

    value: Any
    grad: bool

    @classmethod
    def of(cls, value: Any) -> _Constant:
        if isinstance(value, Tensor):
            return cls(Held.of(value), value.requires_grad)
        return cls(value, False)

    def fresh(self) -> Any:
        if isinstance(self.value, Held):
            return _trusted(self.value, "an argument of the cells").detach().requires_grad_(self.grad)
        return self.value


def run(
    graph: Graph,
    cells: Sequence[nn.Module],
    stem: Tensor,
    modes: Sequence[Memory],
    context: Mapping[str, Any],
    taps: Sequence[int] = (),
) -> tuple[list[Tensor], list[Tensor]]:
    """Run all cells; returns the last m states and the states at the indices `taps`.

    Without a gradient to record, and where autograd's hooks do not reach (export, `torch.func`), there is no tape.

    Args:
        graph: nodes in order, one a cell.
        cells: modules with the signature of `revnets.cell.Cell.forward`.
        stem: what `STEM` reads stand for.
        modes: memory mode of each column.
        context: keyword arguments for every cell, such as a padding mask.
    """
    if not torch.is_grad_enabled() or all(mode is Memory.STORE for mode in modes) or _is_transformed():
        return _run_plain(graph, cells, stem, context, taps)
    return _run_taped(graph, cells, stem, modes, context, taps)


def _is_transformed() -> bool:
    """Does something else than autograd's backward look at the operations? Export and torch.func know no hooks."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def _run_plain(graph, cells, stem, context, taps):
    states: dict[int, Tensor] = {}
    tapped: dict[int, Tensor] = {}
    for node in graph.nodes:
        past = None if node.residual is None else states[node.residual]
        couple = None if past is None else partial(_couple_plain, graph.name(node.index), past)
        reads = [stem if read == STEM else states[read] for read in node.reads]
        state = cells[node.index](*reads, couple=couple, **context)
        _advance(graph, states, tapped, node, state, taps)
    return list(states.values()), [tapped[index] for index in taps]


@torch.compiler.disable(reason="the tape is plain Python; to compile the cells, call compile() of the columns")
def _run_taped(graph, cells, stem, modes, context, taps):
    if _nesting.inside:
        return _run_plain(graph, cells, stem, context, taps)
    tape = Tape(graph, cells, stem, context)
    states: dict[int, Tensor] = {}
    tapped: dict[int, Tensor] = {}
    started = False  # has anything so far needed a gradient?
    for node in graph.nodes:
        past = None if node.residual is None else states[node.residual]
        reads = [stem if read == STEM else states[read] for read in node.reads]
        started = started or _needs_grad(cells[node.index], reads, context)
        if started:
            state = tape.record(node, reads, past, modes[node.column], context)
        else:
            couple = None if past is None else partial(_couple_plain, graph.name(node.index), past)
            state = cells[node.index](*reads, couple=couple, **context)
            tape.skip()
        _advance(graph, states, tapped, node, state, taps)
    tape.close(states)
    return list(states.values()), [tapped[index] for index in taps]


def _advance(graph: Graph, states: dict, tapped: dict, node: Node, state: Tensor, taps: Sequence[int]) -> None:
    """Move the window of m states up by one."""
    states[node.index] = state
    states.pop(node.index - graph.m, None)
    if node.index in taps:
        tapped[node.index] = state


def invert(
    graph: Graph, cells: Sequence[nn.Module], last: Sequence[Tensor], stem: Tensor, context: Mapping[str, Any]
) -> list[list[Tensor]]:
    """All states from the last m of them, column by column, last column first. No gradients."""
    total = len(graph.nodes)
    states = dict(zip(range(total - len(last), total), last, strict=True))
    with torch.no_grad():
        for node in reversed(graph.nodes):
            if node.residual is None:
                break
            reads = [stem if read == STEM else states[read] for read in node.reads]
            states[node.residual] = cells[node.index](*reads, couple=partial(subtract, states[node.index]), **context)
    columns: list[list[Tensor]] = [[] for _ in range(graph.columns)]
    for node in graph.nodes:
        columns[node.column].append(states[node.index])
    return columns[::-1]


def _needs_grad(cell: nn.Module, reads: list[Tensor], context: Mapping[str, Any]) -> bool:
    return (
        any(read.requires_grad for read in reads)
        or any(parameter.requires_grad for parameter in cell.parameters())
        or any(isinstance(value, Tensor) and value.requires_grad for value in context.values())
    )


def _with_stride(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The tensor in memory laid out as `stride` says (Rule 4)."""
    if tensor.stride() == stride:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _is_unchanged(state: Tensor, coupled: Tensor, version: int) -> bool:
    return (state is coupled or state.is_set_to(coupled)) and state._version == version


def _trusted(held: Held, name: str) -> Tensor:
    if held.tensor._version != held.version:
        raise ReplayError(
            f"{name} was changed in place after the forward (version {held.tensor._version}, expected {held.version}), "
            "so backward cannot use it. Work on a copy: tensor.clone()"
        )
    return held.tensor


def _detached(gamma: Tensor | float) -> Tensor | float:
    return gamma.detach() if isinstance(gamma, Tensor) else gamma


def _never(_: int) -> Tensor:
    raise ReplayError("a backward inside of a cell's forward is not supported; use torch.func or memory='store'")
