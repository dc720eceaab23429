"""A pipeline stage: a range of cells, from the states that it receives to the states that it sends.

After a cut between two cells, the later cells need the states that have not been replaced yet, and the stem's output
if they read it: in RevCol, m states for any number of columns. Each stage has its own tape. In `exact` it rebuilds the
received states bit for bit, so it keeps only lost bits for every micro-batch in flight.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from revnets.engine.cell import Cell
from revnets.engine.errors import ArgumentError
from revnets.engine.executor import PlainPass, TapedPass, is_recorded, modes_of_cells
from revnets.engine.graph import STEM, Graph
from revnets.engine.memory_mode import Memory
from revnets.engine.pipeline.boundary import Enter, Leave, generator_state, read_header, set_generator_state
from revnets.engine.pipeline.partition import cell_costs, partition
from revnets.engine.replay.threads import is_inside
from revnets.engine.torch_internals import without_dynamo

if TYPE_CHECKING:
    from revnets.engine.columns import ReversibleColumns


class ColumnsStage(nn.Module):
    """A range of the cells of reversible columns, as one pipeline stage.

    Parameters are shared with the columns. They have the same names as in a model with the attributes `stem`, `columns`
    and `head`, without the prefix `columns.`.

    The random numbers of a micro-batch form one stream through all stages, as in one process: the first stage seeds the
    generators, and their state is sent with the states. The generators of the process are restored after the forward
    pass.

    Args:
        columns: Columns of the cells.
        cells: Indices of the cells.
        stem: Used by the first stage, before its cells.
        head: Used by the last stage; receives the list of states that the columns return.

    Attributes:
        policy: What the cells keep for backward, a copy of the policy of all columns.
        incoming: Indices of the states that the stage receives, `STEM` for the stem's output.
        outgoing: Indices of the states that the stage sends.
    """

    def __init__(
        self, columns: ReversibleColumns, cells: range, stem: nn.Module | None = None, head: nn.Module | None = None
    ):
        super().__init__()
        graph = columns.graph
        self.graph, self.range, self.policy = graph, cells, columns.policy
        self.incoming, self.outgoing = live_states(graph, cells.start), live_states(graph, cells.stop)
        self.is_first, self.is_last = cells.start == 0, cells.stop == len(graph.nodes)
        self.stem = stem if self.is_first else None
        self.cells = nn.ModuleDict()
        for node in graph.nodes[cells.start : cells.stop]:
            place = graph.states_of(node.column).index(node.index)  # the level, as in the columns
            self._column(node.column)[str(place)] = columns.flat()[node.index]
        self.head = head if self.is_last else None
        for module in (self, self.cells, *self.cells.children()):  # the cells keep their own flags
            module.training = columns.training

    def _column(self, column: int) -> nn.ModuleDict:
        name = str(column)
        if name not in self.cells:
            self.cells[name] = nn.ModuleDict()
        return cast(nn.ModuleDict, self.cells[name])

    def flat(self) -> list[Cell]:
        """Return the cells in the order in which they run."""
        columns = cast(Iterable[nn.ModuleDict], self.cells.values())
        return [cast(Cell, cell) for column in columns for cell in column.values()]

    def forward(self, *inputs: Tensor, seed: Tensor | int | None = None, **context: Any) -> Any:
        """Run the stage on the model's input or on the output of the previous stage.

        Args:
            inputs: One tensor for the first stage; a header and the states `incoming` for later stages.
            seed: Seed of this micro-batch's random numbers, as in `torch.manual_seed`, or a tensor with one element.
                Only the first stage uses it. By default it draws a seed in training, and none in evaluation.
            context: Keyword arguments for the function of every cell, such as a padding mask.

        Returns:
            A header and the states `outgoing`. The last stage returns the output of its head, or without a head the
            tuple of states that the columns return.

        Raises:
            ArgumentError: If the number of inputs is wrong.
        """
        expected = 1 if self.is_first else 1 + len(self.incoming)
        if len(inputs) != expected:
            text = f"got {len(inputs)} inputs; cells {self.range.start} to {self.range.stop - 1} need {expected}"
            raise ArgumentError(text, "inputs", code="wrong-length")
        if self.is_first and seed is None and any(cell.training for cell in self.flat()):
            seed = torch.randint(2**63 - 1, ())
        device = inputs[-1].device
        with _own_generators(device):
            if self.is_first:
                if seed is not None:
                    _seed(int(seed), device)
                received = {STEM: inputs[0] if self.stem is None else self.stem(inputs[0])}
            else:
                read = read_header(inputs[0].detach(), [state.ndim for state in inputs[1:]])
                if read is not None:
                    set_generator_state(read[1], device)
                states = Enter.apply(None if read is None else read[0], *inputs)
                received = dict(zip(self.incoming, states, strict=True))
            left = self._run(received, context)
            states = [left[index] for index in self.outgoing]
            if self.is_last:
                return tuple(states) if self.head is None else self.head(states)
            return Leave.apply(generator_state(device), *states)

    @without_dynamo  # the tape is plain Python; compile() of the columns compiles the cells
    def _run(self, states: dict[int, Tensor], context: dict[str, Any]) -> dict[int, Tensor]:
        """Run the cells, and return all remaining states and the stem's output."""
        graph, start, policy = self.graph, self.range.start, self.policy
        modes = modes_of_cells(graph, policy.modes, policy.stored, dict(policy.kept))
        cells: list[nn.Module] = [*[_ABSENT] * start, *self.flat()]
        stem = states.get(STEM, torch.empty(0))
        if is_recorded(modes[start : self.range.stop], self._offloaded) and not is_inside():
            run: PlainPass = self._taped(cells, stem, modes, context, states)
        else:
            run = PlainPass(graph, cells, stem)
        run.states.update({index: state for index, state in states.items() if index != STEM})
        for node in graph.nodes[start : self.range.stop]:
            run.step(node, context)
        run.close()
        return {**run.states, STEM: stem}

    @property
    def _offloaded(self) -> frozenset[int]:
        return self.policy.offloaded.intersection(self.range)

    def _taped(
        self,
        cells: Sequence[nn.Module],
        stem: Tensor,
        modes: Sequence[Memory],
        context: dict[str, Any],
        states: dict[int, Tensor],
    ) -> TapedPass:
        ways: dict[str, Any] = {
            "verify": self.policy.verify,
            "kept": dict(self.policy.kept),
            "products": dict(self.policy.products),
        }
        run = TapedPass(self.graph, cells, stem, modes, context, **ways, offloaded=self._offloaded)
        for _ in range(self.range.start):
            run.tape.skip()
        run.started = any(state.requires_grad for index, state in states.items() if index != STEM)
        if run.tape.verifier is not None:
            for index, state in states.items():
                run.tape.verifier.note(index, state)
        return run

    def extra_repr(self) -> str:
        modes = {str(self.policy.modes[node.column]) for node in self.graph.nodes[self.range.start : self.range.stop]}
        return f"cells {self.range.start} to {self.range.stop - 1}, memory={'/'.join(sorted(modes))}"


_ABSENT = nn.Identity()
"""Placeholder for the cells of earlier stages."""


def stages_of(
    columns: ReversibleColumns,
    stages: int,
    stem: nn.Module | None,
    head: nn.Module | None,
    balance: str | Sequence[float],
    x: Tensor | None,
) -> list[ColumnsStage]:
    """Divide columns into pipeline stages; see `ReversibleColumns.split`."""
    if columns.budget is not None:
        text = f"the memory budget {columns.budget.budget} is pending; plan it for the whole model before the split"
        raise ArgumentError(text, "memory", code="conflicting-values")
    if Memory.INVERT in columns.memory:
        text = "memory 'invert' drifts, which a single stage cannot predict; use 'exact' in a pipeline"
        raise ArgumentError(text, "memory", code="conflicting-values")
    parts = partition(cell_costs(columns, balance, x, stem, head), stages)
    return [ColumnsStage(columns, part, stem, head) for part in parts]


def live_states(graph: Graph, at: int) -> tuple[int, ...]:
    """Return the states before cell `at`, and `STEM`, that it or later cells use or that the columns return."""
    if at == len(graph.nodes):
        return graph.last
    later = graph.nodes[at:]
    needed = {read for node in later for read in (*node.reads, node.residual) if read is not None}
    return tuple(sorted(index for index in needed | set(graph.last) if index < at))


@contextmanager
def _own_generators(device: torch.device) -> Generator[None]:
    """Restore the states of the default generators at the end."""
    if device.type == "meta":
        yield
        return
    before = generator_state(device)
    try:
        yield
    finally:
        set_generator_state(before, device)


def _seed(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).manual_seed(seed)
