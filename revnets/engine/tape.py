"""The tape: records cells going forward, rebuilds their inputs and replays them going backward.

The forward runs under ordinary autograd. A recorded cell leaves no tensor in the graph: each one that autograd wants
to save is replaced by a packed handle (tape, t, k). The first handle of a cell that backward unpacks makes the tape

1. rebuild x_{t-m} = (x_t - F_t) / gamma_t and thereby move its window of m states one step down, and
2. replay the cell, which saves the same tensors in the same order; handle k is unpacked to the k-th of them.

The rules that keep this right:

- Rule 1. Nothing about a pass is stored on a module. Cell records belong to a tape, a tape to one call of `run`; two
  forwards before one backward have two tapes.
- Rule 2. References go one way: graph -> handle -> tape -> cell records -> plain tensors. When the graph lets go of its
  handles (after backward, or when it is dropped), everything goes by reference counting.
- Rule 3. The window only moves down. A handle from above the window (a second backward, a double backward, a loss on
  an early tap after a loss at the end) makes the tape start again from the top. The top is the last window until the
  graph has let go of all handles above the window (a backward that does not retain it does so as it goes); then
  nobody can ask for those cells again, the top moves down with the window, and what they kept is dropped.
- Rule 4. A rebuilt state gets the strides of the original: with others, kernels take other paths and round otherwise.
- Rule 5. A replay runs in the context of its forward (`replay_context.py`), under the same `requires_grad` of its
  reads, and must save what the forward saved: number, shape, strides and dtype are checked.
- Rule 6. What was changed in place after the forward cannot be trusted; versions are checked as autograd does.
- Rule 7. Tapes do not nest. Columns inside of a cell run plainly, and the replay of the cell brings back what they
  saved; a tape of their own would keep their window for every cell around them.
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
    if isinstance(handle, PackedHandle):
        return handle.tape.unpack(handle.t, handle.k)
    return trusted(handle.on_device(), "a tensor that a cell saved")


class Tape:
    """What one pass keeps for its backward: the last window, the constants, and a record a cell."""

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
        self.last: Mapping[int, Held | HostedTensor] = {}  # the window at its top, from which it starts
        self.top = -1
        self.window: dict[int, Held] = {}
        self.cursor = -1  # the window holds x_cursor, or already x_{cursor-m}, and the m - 1 states between them
        self.lock = threading.RLock()  # autograd runs one thread a device
        self.verifier = None
        if verify:
            from revnets.engine.replay.checksums import Verifier

            self.verifier = Verifier(graph)
        self.host = None
        if offloaded:
            from revnets.engine.offload.host_store import HostStore  # no other pass needs it

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
        """Run a cell so that the graph keeps handles in place of what it saves.

        Args:
            context: keyword arguments of the cell.
            is_common: are they those of the tape, which all cells have in common? Others are noted for the replay.
        """
        if past is not None and mode is not Memory.STORE and is_same_memory(past, self.stem.tensor):
            mode = Memory.RECOMPUTE  # a stream that starts as the stem, as RevNet's do: the tape holds it anyway
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
            if mode is Memory.STORE or len(record.metas) == record.replayed:  # the rest stays
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
                f"{self._name(node)} changed one of its reads in place; other cells still need that state. "
                "Work on a copy, or use the out-of-place operation",
                code="changed-in-place",
                cell=self.graph.name(node.index),
            )
        self.records.append(record)
        if self.host is not None:
            self.host.send(record, cell, self._name(node), state)
        if node.residual is not None and (before := self.records[node.residual]) is not None:
            before.settle()  # of a column ago: the counts have long arrived from the device
            if self.host is not None:
                self.host.send_settled(before, self._name(before.node))
        if self.verifier is not None:
            self.verifier.note(node.index, state)
        return state

    def skip(self) -> None:
        """A cell below everything that needs a gradient, for which backward does not ask."""
        self.records.append(None)

    def _record_of(self, t: int) -> CellRecord:
        record = self.records[t]
        assert record is not None  # nobody asks for a cell below the first that needs a gradient
        return record

    def close(self, states: Mapping[int, Tensor]) -> None:
        """End of the forward: hold the last m states, from which backward starts.

        It starts below stored cells at the end, which have no handles: their states are not needed here.
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
        """The k-th tensor that cell t saved, for a packed handle."""
        if self.top < 0:
            name = self.graph.name(t)
            raise ReplayError(
                f"cell {name} is asked for what it saved before the forward is over. {EARLY_BACKWARD}",
                code="early-replay",
                cell=name,
            )
        record = self._record_of(t)
        with self.lock:
            if k not in record.saved:
                self.move_to(t)
                self._replay(record, collect=True)
                if record.products is not None and not is_graph_kept():
                    record.products = None  # a later replay computes them
                self._let_go()
            saved = record.saved[k]
            self._release(record, k)
        if saved.tensor._version == saved.version:  # to put the name together takes longer than all else here
            return saved.tensor
        return trusted(saved, f"a tensor that {self._name(record.node)} saved")

    def _release(self, record: CellRecord, k: int) -> None:
        """Forget a saved tensor once its node has used it: one use a pass, and a second pass replays (Rule 3)."""
        node = running_node()
        if node is None:
            return  # read outside of a backward, perhaps again; forgotten when the window moves on
        if not may_read_again(node):
            del record.saved[k]
            return

        def done(*_: object) -> None:
            handle.remove()
            record.saved.pop(k, None)

        handle = node.register_hook(done)

    def move_to(self, index: int) -> None:
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
        """Forget x_t, having made sure of x_{t-m}."""
        record = self._record_of(self.cursor)
        residual = record.node.residual
        record.settle()
        if residual is not None and residual not in self.window:
            if record.kept is not None:
                self.window[residual] = record.kept.on_device()
            else:
                self._replay(record, collect=False)
        record.saved.clear()  # handles that this backward did not need
        self._let_go()
        self.cursor -= 1

    def _let_go(self) -> None:
        """Drop x_t, which is needed for x_{t-m} alone, and move the top down if nobody can ask for more (Rule 3)."""
        self.window.pop(self.cursor, None)
        if any(self._record_of(t).has_live_handles() for t in range(self.cursor + 1, self.top + 1)):
            return
        self.records[self.cursor + 1 :] = [None] * (len(self.records) - self.cursor - 1)
        self._record_of(self.cursor).lost = None
        self.last, self.top = dict(self.window), self.cursor

    def _replay(self, record: CellRecord, collect: bool) -> None:
        """Call the cell again on rebuilt reads; put x_{t-m} into the window and, if asked, collect what it saves.

        Where x_{t-m} need not be rebuilt, the call ends after the last saved tensor: the rest serves x_t alone.
        """
        record.settle()
        node, residual = record.node, record.node.residual
        saved: list[Held] = []
        assert record.replay_context is not None  # only in `store`, where there are no handles
        has_past = residual is None or self.find_past(record) is not None
        if has_past:
            self._let_go()  # of x_t, before the replay takes its room
        ends_early = collect and has_past and self.verifier is None

        def pack(tensor: Tensor) -> None:
            if collect and len(saved) != record.replayed:
                saved.append(Held.of(tensor))
            if ends_early and record.is_like(saved):
                raise AllCollected

        # Gradients are enabled even where nothing is collected: without them some modules take other kernels.
        couple = None if residual is None else ReplayCoupling(self, record)
        with (
            without_transforms(),  # one replay for all of a batched backward
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
        """x_{t-m} from the window, or into the window if the forward kept it; None if it has to be rebuilt."""
        residual = record.node.residual
        assert residual is not None  # or there would be nothing to couple with
        if residual not in self.window:
            if record.kept is None:
                return None
            self.window[residual] = record.kept.on_device()
        return self.state(residual)

    def put_back(self, record: CellRecord, past: Tensor) -> None:
        """Take a rebuilt x_{t-m} into the window; x_t is needed no longer."""
        assert record.node.residual is not None
        if self.verifier is not None:
            self.verifier.rebuilt(record.node, self._name(record.node), record.mode, past)
        self.window[record.node.residual] = Held.of(past)
        self._let_go()

    def state(self, index: int) -> Tensor:
        """x_index, which the window holds."""
        return trusted(self.window[index], f"the state of {self.graph.name(index)}")

    def _read(self, index: int, grad: bool) -> Tensor:
        state = trusted(self.stem, "the stem") if index == STEM else self.state(index)
        return state.detach().requires_grad_(grad)

    def _name(self, node: Node) -> str:
        cell = self.cells[node.index]
        return f"cell {self.graph.name(node.index)} ({type(getattr(cell, 'function', cell)).__name__})"


def _never(_: int) -> Tensor:
    raise ReplayError(f"a replay is asked for what it saves before it is over. {EARLY_BACKWARD}", code="early-replay")
