"""A sequence whose cells are the blocks of a network, which the network itself calls one after another.

The blocks stay where they are, with their names, hooks and arguments; each one's `forward` is replaced by that of a
`BlockCall`, which runs one cell of the sequence. So whatever the network does around its blocks goes on as before.
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
"""Attribute of a rewired block: its `BlockCall`."""

CHECKPOINTING = "gradient checkpointing stays off: the blocks are reversible and rebuild their inputs already"

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Further arguments of a block's call, positional ones and keywords, without the state."""


class BlockCell(Cell):
    """One update x_t from a trained block.

    Args:
        block: shape-preserving module G(x) = x + f(x); its first argument is the state.
        blend: the rule that combines G(x_{t-1}) with x_{t-1} and x_{t-2}.
        is_first: is it the first block, for which x_{t-2} = x_{t-1}?
    """

    function: nn.Module

    def __init__(self, block: nn.Module, blend: Blend, is_first: bool):
        super().__init__(block, None if is_first else FixedGain(1.0))
        if not is_first:
            self.gain = blend  # type: ignore[assignment]  # it takes the state and gives all coefficients
        self.blend = blend
        self.wrapper: Callable[..., Any] | None = vars(block).get("forward")  # that another tool has put there
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
        """x_t from x_{t-1}.

        Args:
            arguments: further arguments of the block.
            number: of the update rule, as it was in the forward: a schedule may move on before a replay.
            extras: gets what the block returns besides its state, or None if it returns the state alone.

        Raises:
            ArgumentError: the block returns something else than a state, or a tuple that begins with one.
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
            text = f"{name} returns a {type(output).__name__}; a reversible block returns its state, or a tuple with it"
            raise ArgumentError(f"{text} in front", name, code="unsupported-block")
        if output.shape != x.shape:
            name = type(self.function).__name__
            text = f"{name} makes {tuple(output.shape)} out of {tuple(x.shape)}; a reversible block keeps the shape"
            raise ArgumentError(f"{text}. Leave it out of `blocks`", name, code="shape-mismatch")
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
        """|gamma_t| in training, of a learned blend as it is now."""
        return self.blend.gamma or 1.0  # at 0 the state is kept, and nothing drifts

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the block's own forward. What is around it stays outside of the compiled code."""
        self.compiled = torch.compile(self._block_forward(), *args, **kwargs)

    def _block_forward(self) -> Callable[..., Any]:
        """The forward of the block as it was before; looked up in each call, so that copies call their own."""
        return self.wrapper or partial(type(self.function).forward, self.function)


class Start(nn.Module):
    """x_0: the input itself, as the first state."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x


class RewiredSequence(ReversibleSequence):
    """Blocks of a network as a reversible sequence with m = 2.

    State 0 is the input of the first block, state t the output of block t - 1.

    Args:
        names: of the blocks, for error messages.
        blocks: modules of one shape; their present `forward` becomes the function of the cells.
        blends: one per block.
        memory: as in `ReversibleColumns`.
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
        self._passes: dict[int, PlainPass] = {}  # of each thread, from the first block of a forward to the last one

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_passes": {}}  # a pass that goes on belongs to the original

    @property
    def block_cells(self) -> list[BlockCell]:
        """The cells of the blocks, in order."""
        return [cell for cell in self.flat() if isinstance(cell, BlockCell)]

    def step(self, position: int, x: Tensor, arguments: Arguments) -> tuple[Tensor, tuple[Any, ...] | None]:
        """Run block `position`, as the network calls it.

        Args:
            x: x_{t-1} (B, ..., C), the very state that the block before returned.
            arguments: further arguments of the block.

        Returns:
            The state x_t, and what else the block returns; None if that is nothing, not even a tuple.

        Raises:
            ArgumentError: blocks are skipped or called in another order, the network changes the state between two of
                them, or a cache of keys and values is filled while gradients are recorded.
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
                    f"{self.names[position]} fills a cache of keys and values, which a replay in backward would fill "
                    "again. Pass use_cache=False in training, or set model.config.use_cache = False"
                )
                raise ArgumentError(text, "use_cache", code="conflicting-values")
        modes = modes_of_cells(self.graph, self.memory, self.stored, self.kept)
        ways = {"verify": self.verify, "kept": self.kept, "offloaded": self.offloaded, "products": self.products}
        return self._step(position, x, arguments, lambda: TapedPass(self.graph, self.flat(), x, modes, {}, **ways))

    def _turn_off_checkpointing(self) -> None:
        """The flag by which `gradient_checkpointing_enable` of transformers makes a layer checkpoint itself."""
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
        """The pass that the blocks before have begun, if block `position` goes on with it."""
        before, block = self.names[position - 1 : position + 1]
        run = self._passes.get(thread)
        if run is None or position not in run.states:
            text = (
                f"{block} is called, but {before} was not called just before; all "
                "blocks of a reversible sequence run in their order. Are layers skipped at random (layerdrop)?"
            )
            raise ArgumentError(text, block, code="unsupported-block")
        state = run.states[position]
        if x is not state and not is_same_memory(x, state):
            text = (
                f"the network changes the state between {before} and {block}, and a "
                "state that is changed outside of the blocks cannot be rebuilt. Name the blocks behind in `blocks`; "
                "with FSDP2, leave out the output_dtype of its MixedPrecisionPolicy"
            )
            raise ArgumentError(text, block, code="unsupported-block")
        return run


def rewired_sequences(model: nn.Module) -> list[RewiredSequence]:
    """The sequences to which blocks of a model belong, in the order of the model; none if it is not rewired."""
    calls = (vars(module).get(CALL) for module in model.modules())
    return list(dict.fromkeys(call.sequence for call in calls if call is not None))


class BlockCall:
    """What a rewired block does when it is called: one step of its sequence.

    Args:
        sequence: of the block.
        position: of the block in the sequence, from 0.
        state_name: of its first argument, which may be passed as a keyword.
    """

    def __init__(self, sequence: RewiredSequence, position: int, state_name: str):
        self.sequence = sequence
        self.position = position
        self.state_name = state_name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            x, *positional = args
        else:
            kwargs = dict(kwargs)
            x, positional = kwargs.pop(self.state_name), []
        state, rest = self.sequence.step(self.position, x, (tuple(positional), kwargs))
        return state if rest is None else (state, *rest)
