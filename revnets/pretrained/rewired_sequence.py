"""A sequence whose cells are the blocks of a network, which the network calls one after another.

The blocks stay in the network, with their names, hooks and arguments. The `forward` of each block is replaced by that
of a `BlockCall`, which runs one cell of the sequence. The rest of the network is unchanged.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from revnets.engine import drift
from revnets.engine.cell import Cell, Couple, FixedGain, first_state
from revnets.engine.cell_record import is_same_memory
from revnets.engine.columns import ReversibleSequence
from revnets.engine.errors import ArgumentError
from revnets.engine.executor import PlainPass, TapedPass, is_recorded, modes_of_cells
from revnets.engine.memory_mode import Memory
from revnets.engine.replay.threads import is_inside
from revnets.engine.torch_internals import tree_leaves, without_dynamo
from revnets.pretrained.update_rules import Blend, start_of, update_of

CALL = "_reversible_call"
"""Name of the attribute of a rewired block that holds its `BlockCall`."""

CHECKPOINTING = "gradient checkpointing stays off: the blocks are reversible and already rebuild their inputs"

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block's call, without the state."""


class BlockCell(Cell):
    """A cell that updates x_t with a trained block.

    Args:
        block: Shape-preserving module G(x) = x + f(x); its first argument is the state.
        blend: Rule that combines G(x_{t-1}) with x_{t-1} and x_{t-2}.
        is_first: Whether this is the first block, for which x_{t-2} = x_{t-1}.
    """

    function: nn.Module

    def __init__(self, block: nn.Module, blend: Blend, is_first: bool):
        super().__init__(block, None if is_first else FixedGain(1.0))
        if not is_first:
            self.gain = blend  # type: ignore[assignment]  # maps the state to all coefficients
        self.blend = blend
        self.wrapper: Callable[..., Any] | None = vars(block).get("forward")  # set by another tool
        self.compiled: Callable[..., Any] | None = None
        self.is_first = is_first

    def forward(
        self,
        *reads: Tensor,
        couple: Couple | None = None,
        arguments: Arguments = ((), {}),
        extras: list[tuple[Any, ...] | None] | None = None,
        number: float | None = None,
        **context: Any,
    ) -> Tensor:
        """Return x_t.

        Args:
            reads: x_{t-1}.
            couple: Computes x_t from F_t and gamma_t.
            arguments: Other arguments of the block.
            extras: List to which the block's other outputs are appended, or None if it returns only the state.
            number: Parameter of the update rule in the forward pass, which a schedule may change before a replay.
            context: Keyword arguments of the block.

        Raises:
            ArgumentError: If the block returns neither a state nor a tuple that starts with one, or changes the shape.
        """
        (x,) = reads
        positional, keywords = arguments
        forward = self.compiled or self._block_forward()
        output = forward(x, *positional, **keywords, **context)
        rest = None
        if isinstance(output, tuple | list):
            output, *further = output
            rest = tuple(further)
        if not isinstance(output, Tensor):
            name = type(self.function).__name__
            text = f"{name} returns a {type(output).__name__}; a reversible block must return its state, or a tuple"
            raise ArgumentError(f"{text} that starts with it", name, code="unsupported-block")
        if output.shape != x.shape:
            name = type(self.function).__name__
            text = f"{name} changes shape {tuple(x.shape)} to {tuple(output.shape)}; a reversible block must keep it"
            raise ArgumentError(f"{text}. Omit the block from `blocks`", name, code="shape-mismatch")
        if extras is not None:
            extras.append(rest)
        coefficients = self.blend(x, self.function.training, number)
        if self.is_first:
            return first_state(update_of(output, x, start_of(coefficients)))
        update = update_of(output, x, coefficients)
        if couple is None:
            return first_state(update)
        return couple(update, coefficients.residual)

    def gamma(self) -> float:
        """Return the current |gamma_t| in training."""
        return self.blend.gamma or 1.0  # at 0 the state is kept, so there is no drift

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the block's original forward. The update rule and the coupling stay eager."""
        self.compiled = torch.compile(self._block_forward(), *args, **kwargs)

    def _block_forward(self) -> Callable[..., Any]:
        """Return the original forward of the block; looked up in each call, so that copied blocks call their own."""
        return self.wrapper or partial(type(self.function).forward, self.function)


class Start(nn.Module):
    """Returns its input as the first state x_0."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """Return x."""
        return x


class RewiredSequence(ReversibleSequence):
    """Blocks of a network as a reversible sequence with m = 2.

    State 0 is the input of the first block, and state t is the output of block t - 1.

    Args:
        names: Names of the blocks in error messages.
        blocks: Modules of equal shape; their current `forward` becomes the function of the cells.
        blends: Update rule of each block.
        memory: As in `ReversibleColumns`.
    """

    def __init__(
        self,
        names: Sequence[str],
        blocks: Sequence[nn.Module],
        blends: Sequence[Blend],
        memory: str | Sequence[str] = "exact",
    ):
        cells = [
            BlockCell(block, blend, index == 0) for index, (block, blend) in enumerate(zip(blocks, blends, strict=True))
        ]
        super().__init__([Cell(Start(), None), *cells], memory=memory)
        self.names = tuple(names)
        self._passes: dict[int, PlainPass] = {}  # by thread, from the first block of a forward pass to the last one

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_passes": {}}  # an unfinished pass belongs to the original

    @property
    def block_cells(self) -> list[BlockCell]:
        """The cells of the blocks, in order."""
        return [cell for cell in self.flat() if isinstance(cell, BlockCell)]

    def step(self, position: int, x: Tensor, arguments: Arguments) -> tuple[Tensor, tuple[Any, ...] | None]:
        """Run one block when the network calls it.

        Args:
            position: Position of the block, from 0.
            x: x_{t-1} (B, ..., C), the tensor that the previous block returned.
            arguments: Other arguments of the block.

        Returns:
            The state x_t, and a tuple of the block's other outputs, or None if the block returns only the state.

        Raises:
            ArgumentError: If blocks are skipped or called in another order, the network changes the state between two
                blocks, or a cache of keys and values is filled while gradients are recorded.
        """
        modes = modes_of_cells(self.graph, self.memory, self.stored, self.kept)
        if is_recorded(modes, self.offloaded) and not is_inside():
            return self._recorded_step(position, x, arguments)
        return self._step(position, x, arguments, lambda: PlainPass(self.graph, self.flat(), x))

    @without_dynamo
    def _recorded_step(self, position: int, x: Tensor, arguments: Arguments) -> tuple[Tensor, tuple[Any, ...] | None]:
        if position == 0:
            self._turn_off_checkpointing()
            if Memory.INVERT in self.memory:
                drift.watch(self, x)
        for value in tree_leaves(arguments):
            if hasattr(value, "get_seq_length"):  # any cache of transformers
                text = (
                    f"{self.names[position]} fills a cache of keys and values, which a replay would fill again. Pass "
                    "use_cache=False in training, or set model.config.use_cache = False"
                )
                raise ArgumentError(text, "use_cache", code="conflicting-values")
        modes = modes_of_cells(self.graph, self.memory, self.stored, self.kept)
        ways = {"verify": self.verify, "kept": self.kept, "offloaded": self.offloaded, "products": self.products}
        return self._step(position, x, arguments, lambda: TapedPass(self.graph, self.flat(), x, modes, {}, **ways))

    def _turn_off_checkpointing(self) -> None:
        """Reset the flag of transformers' `gradient_checkpointing_enable`, with which a layer checkpoints itself."""
        flagged = [cell.function for cell in self.block_cells if getattr(cell.function, "gradient_checkpointing", 0)]
        for block in flagged:
            block.gradient_checkpointing = False  # type: ignore[assignment]
        if flagged:
            warnings.warn(CHECKPOINTING, stacklevel=2)

    def _step(
        self, position: int, x: Tensor, arguments: Arguments, begin: Callable[[], PlainPass]
    ) -> tuple[Tensor, tuple[Any, ...] | None]:
        thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        nodes = self.graph.nodes
        if position == 0:
            run = self._passes[thread] = begin()
            run.step(nodes[0], run.context)
        else:
            run = self._continued(thread, position, x)
        extras: list[tuple[Any, ...] | None] = []
        try:
            number = cast(BlockCell, run.cells[position + 1]).blend.value
            state = run.step(nodes[position + 1], {"arguments": arguments, "extras": extras, "number": number})
        except BaseException:
            self._passes.pop(thread, None)
            raise
        run.close()
        if position + 2 == len(nodes):
            del self._passes[thread]
        return state, extras[0]

    def _continued(self, thread: int, position: int, x: Tensor) -> PlainPass:
        """Return the pass that the previous blocks have begun, after checking that this block continues it."""
        before, block = self.names[position - 1 : position + 1]
        run = self._passes.get(thread)
        if run is None or position not in run.states:
            text = (
                f"{block} is called, but {before} was not called just before. All blocks of a reversible sequence must "
                "run in order. Are layers skipped at random (layerdrop)?"
            )
            raise ArgumentError(text, block, code="unsupported-block")
        state = run.states[position]
        if x is not state and not is_same_memory(x, state):
            text = (
                f"the network changes the state between {before} and {block}, so it cannot be rebuilt. Name only the "
                "blocks after this change in `blocks`; with FSDP2, omit output_dtype of its MixedPrecisionPolicy"
            )
            raise ArgumentError(text, block, code="unsupported-block")
        return run


def rewired_sequences(model: nn.Module) -> list[RewiredSequence]:
    """Return the sequences of a rewired model, in the order of its modules; an empty list if it is not rewired."""
    calls = (vars(module).get(CALL) for module in model.modules())
    return list(dict.fromkeys(call.sequence for call in calls if call is not None))


class BlockCall:
    """The call of a rewired block: one step of its sequence.

    Args:
        sequence: Sequence of the block.
        position: Position of the block in the sequence, from 0.
        state_name: Name of the block's first argument, which may be passed as a keyword.
    """

    def __init__(self, sequence: RewiredSequence, position: int, state_name: str):
        self.sequence = sequence
        self.position = position
        self.state_name = state_name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block with its original arguments and return its outputs, with x_t as the state."""
        if args:
            x, *positional = args
        else:
            kwargs = dict(kwargs)
            x, positional = kwargs.pop(self.state_name), []
        state, rest = self.sequence.step(self.position, x, (tuple(positional), kwargs))
        return state if rest is None else (state, *rest)
