"""The tape: records cells in the forward pass, rebuilds their inputs and replays them in the backward pass.

The forward pass runs under ordinary autograd. A recorded cell leaves no tensor in the graph: each tensor that autograd
saves is replaced by a packed handle (tape, t, k). When backward unpacks the first handle of a cell, the tape

1. rebuilds x_{t-m} = (x_t - F_t) / gamma_t, which moves its window of m states down by one, and
2. replays the cell, which saves the same tensors in the same order; handle k unpacks to the k-th of them.

Correctness depends on these rules:

- Rule 1. Modules hold no state of a pass. Cell records belong to a tape, and a tape to one call of `run`: two forward
  passes before one backward pass have two tapes.
- Rule 2. References go one way: graph -> handle -> tape -> cell records -> plain tensors. When the graph releases its
  handles (after backward, or when it is freed), reference counting frees everything.
- Rule 3. The window only moves down. A handle from above the window (a second backward, a double backward, a loss on
  an intermediate output after a loss at the end) restarts the tape from the top. The top is the last window until the
  graph has released all handles above the current window, which a backward that does not retain the graph does cell by
  cell. Then those cells are not needed again: the top moves down with the window, and what they kept is freed.
- Rule 4. A rebuilt state gets the strides of the original: with other strides, kernels may round differently.
- Rule 5. A replay runs in the context of its forward pass (`replay_context.py`), with the same `requires_grad` of its
  inputs, and must save what the forward pass saved: number, shape, strides and dtype are checked.
- Rule 6. A tensor that was changed in place after the forward pass is an error; versions are checked as in autograd.
- Rule 7. Tapes do not nest. Columns inside a cell run without a tape, and the replay of the cell restores what they
  saved. With separate tapes, each enclosing cell would keep their window.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revnets.engine.cell_record import (
    AllCollected,
    CellRecord,
    Constant,
    Held,
    LivenessToken,
    Meta,
    PackedHandle,
    check_replay,
    is_same_memory,
    trusted,
)
from revnets.engine.coupling import RecordingCoupling, ReplayCoupling
from revnets.engine.errors import EARLY_BACKWARD, ReplayError
from revnets.engine.graph import STEM, Graph, Node
from revnets.engine.memory_mode import Kept, Memory, Products
from revnets.engine.replay.replay_context import ReplayContext
from revnets.engine.replay.threads import inside
from revnets.engine.torch_internals import is_graph_kept, may_read_again, running_node, without_transforms

if TYPE_CHECKING:
    from revnets.engine.offload.host_store import HostedTensor, OffloadedTensor
    from revnets.engine.replay.buffers import Overwritten


def unpack(handle: PackedHandle | Held | OffloadedTensor) -> Tensor:
    """Return the tensor that the graph holds as `handle`: the unpack hook of the tape."""
    if isinstance(handle, PackedHandle):
        return handle.tape.unpack(handle.t, handle.k)
    return trusted(handle.on_device(), "a tensor that a cell saved")


class Tape:
    """What one pass keeps for its backward: the last window, the arguments of cells, and one record per cell."""

    def __init__(
        self,
        graph: Graph,
        cells: Sequence[nn.Module],
        stem: Tensor,
        context: Mapping[str, Any],
        verify: bool = False,
        kept: Kept | None = None,
        offloaded: Collection[int] = (),
        products: Products | None = None,
    ):
        self.graph = graph
        self.cells = cells
        self.stem = Held.of(stem)
        self.context = Constant.of(dict(context))
        self.kept = kept or {}
        self.products = products or {}
        self.overwritten: Overwritten = {}
        self.records: list[CellRecord | None] = []
        self.last: Mapping[int, Held | HostedTensor] = {}  # the window at the top, where backward starts
        self.top = -1
        self.window: dict[int, Held] = {}
        self.cursor = -1  # the window holds x_cursor, or already x_{cursor-m}, and the m - 1 states between them
        self.lock = threading.RLock()  # autograd runs one thread per device
        self.verifier = None
        if verify:
            from revnets.engine.replay.checksums import Verifier

            self.verifier = Verifier(graph)
        self.host = None
        if offloaded:
            from revnets.engine.offload.host_store import HostStore  # rarely needed

            self.host = HostStore(offloaded, stem)

    # ---------------------------------------------------------------- forward

    def record(
        self,
        node: Node,
        reads: list[Tensor],
        past: Tensor | None,
        mode: Memory,
        context: Mapping[str, Any],
        is_common: bool = True,
    ) -> Tensor:
        """Run a cell so that the graph holds handles instead of its saved tensors.

        Args:
            context: Keyword arguments of the cell.
            is_common: Whether these are the arguments of the tape, which all cells share.
        """
        if past is not None and mode is not Memory.STORE and is_same_memory(past, self.stem.tensor):
            mode = Memory.RECOMPUTE  # a stream that starts as the stem, as in RevNet: the tape holds it anyway
        record = CellRecord(node, mode)
        record.context = self.context if is_common else Constant.of(dict(context))
        record.grad_reads = [read.requires_grad for read in reads]
        versions = [read._version for read in reads]
        cell = self.cells[node.index]
        short = self.graph.name(node.index)
        couple = None if past is None else RecordingCoupling(short, past, self._name(node), record)
        record.replayed = self.kept.get(node.index) if mode is Memory.RECOMPUTE else None
        liveness = LivenessToken()
        record.liveness = weakref.ref(liveness)

        def pack(tensor: Tensor) -> PackedHandle | Held | OffloadedTensor:
            if mode is Memory.STORE or len(record.metas) == record.replayed:  # the rest is kept
                return Held.of(tensor) if self.host is None else self.host.saved(node.index, tensor)
            record.metas.append(Meta.of(tensor))
            return PackedHandle(self, node.index, len(record.metas) - 1, liveness)

        call = partial(cell, *reads, couple=couple, **context)
        if mode is Memory.STORE:
            is_hosted = self.host is not None and node.index in self.host.cells
            with saved_tensors_hooks(pack, unpack) if is_hosted else nullcontext():
                state = call()
        else:
            devices = frozenset(read.device for read in reads)
            recording = ReplayContext.record(cell, devices, self.overwritten)
            keeping = record.keeping(cell, self.products.get(node.index, ()))
            with saved_tensors_hooks(pack, unpack), inside(), recording as record.replay_context, keeping:
                state = call()
        if couple is not None:
            couple.check(state)
        if [read._version for read in reads] != versions:
            raise ReplayError(
                f"{self._name(node)} changed one of its inputs in place, but other cells still need that state. "
                "Modify a copy, or use the out-of-place operation",
                code="changed-in-place",
                cell=self.graph.name(node.index),
            )
        self.records.append(record)
        if self.host is not None:
            self.host.send(record, cell, self._name(node), state)
        if node.residual is not None and (before := self.records[node.residual]) is not None:
            before.settle()  # one column later, its counts have arrived from the device
            if self.host is not None:
                self.host.send_settled(before, self._name(before.node))
        if self.verifier is not None:
            self.verifier.note(node.index, state)
        return state

    def skip(self) -> None:
        """Skip a cell before the first one that needs a gradient; backward does not reach it."""
        self.records.append(None)

    def _record_of(self, t: int) -> CellRecord:
        record = self.records[t]
        assert record is not None  # backward stops at the first cell that needs a gradient
        return record

    def close(self, states: Mapping[int, Tensor]) -> None:
        """End the forward pass: hold the last m states, where backward starts.

        It starts before the stored cells at the end. They have no handles, so their states are not needed here.
        """
        last: dict[int, Held | HostedTensor] = {index: Held.of(state) for index, state in states.items()}
        self.top = len(self.records) - 1
        while self.top > 0 and (record := self.records[self.top]) is not None and record.mode is Memory.STORE:
            if record.node.residual is not None and record.kept is not None:
                last[record.node.residual] = record.kept
            last.pop(self.top, None)
            self.top -= 1
        self.last = last

    # --------------------------------------------------------------- backward

    def unpack(self, t: int, k: int) -> Tensor:
        """Return the k-th tensor that cell t saved, for a packed handle."""
        if self.top < 0:
            name = self.graph.name(t)
            raise ReplayError(
                f"backward reached cell {name} before its forward pass had finished. {EARLY_BACKWARD}",
                code="early-replay",
                cell=name,
            )
        record = self._record_of(t)
        with self.lock:
            if k not in record.saved:
                self.move_to(t)
                self._replay(record, collect=True)
                if record.products is not None and not is_graph_kept():
                    record.products = None  # a later replay recomputes them
                self._let_go()
            saved = record.saved[k]
            self._release(record, k)
        if saved.tensor._version == saved.version:  # a shortcut, since building the name is slow
            return saved.tensor
        return trusted(saved, f"a tensor that {self._name(record.node)} saved")

    def _release(self, record: CellRecord, k: int) -> None:
        """Free a saved tensor once its node has used it; a second backward replays the cell (Rule 3)."""
        node = running_node()
        if node is None:
            return  # read outside of backward, possibly again; freed when the window moves
        if not may_read_again(node):
            del record.saved[k]
            return

        def done(*_: object) -> None:
            handle.remove()
            record.saved.pop(k, None)

        handle = node.register_hook(done)

    def move_to(self, index: int) -> None:
        """Move the window to cell `index`."""
        if self.host is not None:
            self.host.settle()
        if self.cursor < index:
            if self.cursor >= 0:
                self._record_of(self.cursor).saved.clear()
            self.window = {index: held.on_device() for index, held in self.last.items()}
            self.cursor = self.top
        while self.cursor > index:
            self._step_down()

    def _step_down(self) -> None:
        """Move from x_t to x_{t-1}, after making x_{t-m} available."""
        record = self._record_of(self.cursor)
        residual = record.node.residual
        record.settle()
        if residual is not None and residual not in self.window:
            if record.kept is not None:
                self.window[residual] = record.kept.on_device()
            else:
                self._replay(record, collect=False)
        record.saved.clear()  # tensors that this backward did not need
        self._let_go()
        self.cursor -= 1

    def _let_go(self) -> None:
        """Free x_t, which only x_{t-m} needs, and move the top down if no handles above are left (Rule 3)."""
        self.window.pop(self.cursor, None)
        if any(self._record_of(t).has_live_handles() for t in range(self.cursor + 1, self.top + 1)):
            return
        self.records[self.cursor + 1 :] = [None] * (len(self.records) - self.cursor - 1)
        self._record_of(self.cursor).lost = None
        self.last, self.top = dict(self.window), self.cursor

    def _replay(self, record: CellRecord, collect: bool) -> None:
        """Call the cell again on rebuilt inputs, put x_{t-m} into the window, and optionally collect saved tensors.

        If x_{t-m} need not be rebuilt, the call ends after the last saved tensor, because only x_t needs the rest.
        """
        record.settle()
        node, residual = record.node, record.node.residual
        saved: list[Held] = []
        assert record.replay_context is not None  # it is None only in `store`, which has no handles
        has_past = residual is None or self.find_past(record) is not None
        if has_past:
            self._let_go()  # free x_t before the replay allocates memory
        ends_early = collect and has_past and self.verifier is None

        def pack(tensor: Tensor) -> None:
            if collect and len(saved) != record.replayed:
                saved.append(Held.of(tensor))
            if ends_early and record.is_like(saved):
                raise AllCollected

        # Gradients are enabled even if nothing is collected: without them some modules use other kernels.
        couple = None if residual is None else ReplayCoupling(self, record)
        with (
            without_transforms(),  # one replay for a whole batched backward
            torch.enable_grad(),
            saved_tensors_hooks(pack, _never),
            inside(replaying=True),
            record.replay_context.restored(),
            record.giving(self._name(node), self.graph.name(node.index)),
        ):
            reads = [self._read(read, grad) for read, grad in zip(node.reads, record.grad_reads, strict=True)]
            with suppress(AllCollected):
                state = self.cells[node.index](*reads, couple=couple, **Constant.fresh(record.context))
                if self.verifier is not None:
                    self.verifier.replayed(node, self._name(node), state)
        if collect:
            check_replay(record, saved, self._name(node), self.graph.name(node.index))
            record.saved = dict(enumerate(saved))

    def find_past(self, record: CellRecord) -> Tensor | None:
        """Return x_{t-m} from the window or from what the forward pass kept; None if it must be rebuilt."""
        residual = record.node.residual
        assert residual is not None  # a coupling needs a residual
        if residual not in self.window:
            if record.kept is None:
                return None
            self.window[residual] = record.kept.on_device()
        return self.state(residual)

    def put_back(self, record: CellRecord, past: Tensor) -> None:
        """Put a rebuilt x_{t-m} into the window; x_t is no longer needed."""
        assert record.node.residual is not None
        if self.verifier is not None:
            self.verifier.rebuilt(record.node, self._name(record.node), record.mode, past)
        self.window[record.node.residual] = Held.of(past)
        self._let_go()

    def state(self, index: int) -> Tensor:
        """Return the state x_index, which must be in the window."""
        return trusted(self.window[index], f"the state of {self.graph.name(index)}")

    def _read(self, index: int, grad: bool) -> Tensor:
        state = trusted(self.stem, "the stem") if index == STEM else self.state(index)
        return state.detach().requires_grad_(grad)

    def _name(self, node: Node) -> str:
        cell = self.cells[node.index]
        return f"cell {self.graph.name(node.index)} ({type(getattr(cell, 'function', cell)).__name__})"


def _never(_: int) -> Tensor:
    raise ReplayError(f"backward reached a replay that had not finished. {EARLY_BACKWARD}", code="early-replay")
