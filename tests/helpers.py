"""Small nets that hold what real ones hold, and independent routes to their gradients, states, bytes and matmuls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from revnets import engine
from revnets.cell import Cell, FixedGain, Gain
from revnets.columns import ReversibleColumns
from revnets.graph import STEM, Node, ReadToken, wire

REVCOL = ("below", "above")


# ------------------------------------------------------------------- blocks: (B, N, C) -> (B, N, C), made for one dim


class Mlp(nn.Sequential):
    def __init__(self, dim: int):
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class Attention(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))


class Conv(nn.Module):
    """A depthwise convolution along the tokens: its operands are permuted views."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv, self.linear = nn.Conv1d(dim, dim, 3, padding=1, groups=dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.silu(self.conv(x.transpose(1, 2)).transpose(1, 2)))


class Dropout(nn.Sequential):
    def __init__(self, dim: int):
        super().__init__(nn.Linear(dim, dim), nn.Dropout(0.3), nn.Tanh(), nn.Linear(dim, dim))


class DropPath(nn.Module):
    """Drops the whole block for some of the samples (stochastic depth)."""

    def __init__(self, dim: int):
        super().__init__()
        self.block = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.block(x)
        keep = torch.empty(x.shape[0], 1, 1, dtype=x.dtype).bernoulli_(0.7)
        return self.block(x) * keep / 0.7


class BatchNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(dim, dim), nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.linear(x).flatten(0, 1)).view_as(x))


class InPlace(nn.Module):
    """In-place operations on intermediates of its own, as many released blocks have them."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y.mul_(0.5)
        y += x
        return y.relu_()


BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": Mlp,
    "attention": Attention,
    "conv": Conv,
    "dropout": Dropout,
    "droppath": DropPath,
    "batchnorm": BatchNorm,
    "inplace": InPlace,
}
STEADY = ("mlp", "attention", "conv", "inplace")
"""Blocks that compute the same in every call."""


# ------------------------------------------------------------------------------------------------------ fusions, nets


class TokenFunction(nn.Module):
    """F_t on tokens (B, N, C): each read is projected and resampled to this level, summed, and goes through a block."""

    def __init__(self, block: nn.Module, dim: int, length: int, read_dims: Sequence[int]):
        super().__init__()
        self.fuse = nn.ModuleList(nn.Linear(read_dim, dim) for read_dim in read_dims)
        self.block = block
        self.length = length

    def forward(self, *reads: Tensor) -> Tensor:
        x = sum(_resample(linear(read), self.length) for linear, read in zip(self.fuse, reads, strict=True))
        return x + self.block(x)


def _resample(x: Tensor, length: int) -> Tensor:
    if x.shape[1] > length:
        return x.unflatten(1, (length, -1)).mean(2)
    return x.repeat_interleave(length // x.shape[1], dim=1)


class ImageFunction(nn.Module):
    """F_t on images (B, H, W, C): strided convolutions from below, nearest upsampling from above, channels last."""

    def __init__(self, dim: int, side: int, read_dims: Sequence[int], read_sides: Sequence[int]):
        super().__init__()
        self.side = side
        self.fuse = nn.ModuleList()
        for read_dim, read_side in zip(read_dims, read_sides, strict=True):
            step = max(1, read_side // side)
            self.fuse.append(nn.Conv2d(read_dim, dim, step, step))
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.mlp = Mlp(dim)

    def forward(self, *reads: Tensor) -> Tensor:
        x: Any = 0
        for conv, read in zip(self.fuse, reads, strict=True):
            x = x + F.interpolate(conv(read.permute(0, 3, 1, 2)), size=(self.side, self.side))
        return (x + self.mlp(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def fixed(value: float) -> Callable[[int], FixedGain]:
    return lambda dim: FixedGain(value)


def token_net(
    m: int = 3,
    columns: int = 4,
    blocks: Sequence[str] = ("mlp",),
    reads: Sequence[Sequence[ReadToken]] | None = None,
    gamma: float | Callable[[int], nn.Module] = 0.5,
    dims: Sequence[int] | None = None,
    halve: bool = True,
    memory: str | Sequence[str] = "exact",
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    seed: int = 0,
) -> ReversibleColumns:
    """Columns of m levels of shape (B, N / 2^l, dims[l]), N = 2^(m-1) (or N throughout without `halve`).

    Args:
        blocks: names out of `BLOCKS`; cell t gets the (t modulo their number)-th.
        reads: per level; RevCol's `below` and `above` without.
        gamma: where learnable gains start, or a function dim -> gain.
        scale: factor on all weights; below 1 the cells are tamer than PyTorch's initialisation makes them.
    """
    torch.manual_seed(seed)
    dims = list(dims or (5 + 2 * level for level in range(m)))
    lengths = [2 ** (m - 1 - (level if halve else 0)) for level in range(m)]
    make_gain = gamma if callable(gamma) else lambda dim: Gain(dim, gamma)
    graph = wire(m * columns, m, reads or [REVCOL] * m)

    def make(node: Node) -> Cell:
        dim = dims[node.level]
        read_dims = [dims[0] if read == STEM else dims[read % m] for read in node.reads]
        block = BLOCKS[blocks[node.index % len(blocks)]](dim)
        gain = None if node.residual is None else make_gain(dim)
        return Cell(TokenFunction(block, dim, lengths[node.level], read_dims), gain)

    net = ReversibleColumns(graph, [make(node) for node in graph.nodes], memory).to(dtype)
    with torch.no_grad():
        for cell in net.flat():
            for parameter in cell.function.parameters():
                parameter.mul_(scale)
            if isinstance(cell.gain, Gain):  # channels differ, and so do their gains
                cell.gain.weight.mul_(1 + 0.1 * torch.rand_like(cell.gain.weight))
    return net


def image_net(m: int = 3, columns: int = 3, side: int = 8, gamma: float = 0.5, seed: int = 0) -> ReversibleColumns:
    """Columns of m levels of shape (B, side / 2^l, side / 2^l, 4 + 3 l)."""
    torch.manual_seed(seed)
    dims, sides = [4 + 3 * level for level in range(m)], [side // 2**level for level in range(m)]
    graph = wire(m * columns, m, [REVCOL] * m)
    cells = []
    for node in graph.nodes:
        levels = [0 if read == STEM else read % m for read in node.reads]
        function = ImageFunction(
            dims[node.level], sides[node.level], [dims[level] for level in levels], [sides[level] for level in levels]
        )
        cells.append(Cell(function, None if node.residual is None else Gain(dims[node.level], gamma)))
    return ReversibleColumns(graph, cells)


def stem_of(net: ReversibleColumns, batch: int = 2, seed: int = 1, grad: bool = True) -> Tensor:
    """A random input of the right shape and dtype."""
    generator = torch.Generator().manual_seed(seed)
    function = net.flat()[0].function
    dtype = next(net.parameters()).dtype
    if isinstance(function, ImageFunction):
        shape: tuple[int, ...] = (batch, function.side, function.side, function.fuse[0].in_channels)
    else:
        shape = (batch, function.length, function.fuse[0].in_features)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


# --------------------------------------------------------------------------------------- routes to gradients


Train = Callable[[ReversibleColumns, Tensor], Sequence[Tensor]]
"""Forward and backward; returns what is to be compared besides the gradients."""


class Result(NamedTuple):
    """All that a training step leaves behind."""

    outputs: list[Tensor]
    grads: dict[str, Tensor | None]  # of every parameter by name, and of the input as "input"
    buffers: dict[str, Tensor]


def loss_of(levels: Sequence[Tensor]) -> Tensor:
    """Every element of every level counts, each with another weight."""
    return sum(
        (level * torch.linspace(-1, 1, level.numel(), dtype=level.dtype).view_as(level)).sum() for level in levels
    )


def step(
    net: ReversibleColumns,
    x: Tensor,
    memory: str | Sequence[str] | None = None,
    train: Train | None = None,
    autocast: torch.dtype | None = None,
) -> Result:
    """One training step on a copy of the net: from equal random state, so that results of two modes can be compared.

    Args:
        train: forward and backward; by default the gradient of `loss_of` of all levels.
    """
    net = copy.deepcopy(net)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)
    if memory is not None:
        net.memory = memory
    torch.manual_seed(7)
    if train is None:
        with torch.autocast("cpu", autocast) if autocast else nullcontext():
            outputs: Sequence[Tensor] = net(x)
            loss = loss_of(outputs)
        loss.backward()
    else:
        outputs = train(net, x)
    grads = {name: parameter.grad for name, parameter in net.named_parameters()} | {"input": x.grad}
    return Result([output.detach() for output in outputs], grads, dict(net.named_buffers()))


def assert_same(result: Result, expected: Result) -> None:
    """Bit for bit."""
    for index, (output, other) in enumerate(zip(result.outputs, expected.outputs, strict=True)):
        assert torch.equal(output, other), f"output {index} differs"
    assert result.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert _equal(result.grads[name], grad), f"the gradient of {name} differs"
    for name, buffer in expected.buffers.items():
        assert torch.equal(result.buffers[name], buffer), f"buffer {name} differs"


def assert_near(result: Result, expected: Result, **tolerance: float) -> None:
    for output, other in zip(result.outputs, expected.outputs, strict=True):
        torch.testing.assert_close(output, other, **tolerance)
    torch.testing.assert_close(result.grads, expected.grads, **tolerance)
    torch.testing.assert_close(result.buffers, expected.buffers, **tolerance)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


class PlainColumns(ReversibleColumns):
    """The equation of the paper as a loop, for ordinary autograd: nothing of the engine is used."""

    def states(self, x: Tensor) -> list[Tensor]:
        states: list[Tensor] = []
        for node, cell in zip(self.graph.nodes, self.flat(), strict=True):
            state = cell.function(*(x if read == STEM else states[read] for read in node.reads))
            if node.residual is not None:
                state = state + cell.gain() * states[node.residual]
            states.append(state)
        return states

    def forward(self, x: Tensor, *, taps: Sequence[int] = (), **context: Any) -> Any:
        states = self.states(x)
        tapped = [states[(tap + 1) * self.graph.m - 1] for tap in taps]
        return (states[-self.graph.m :], tapped) if taps else states[-self.graph.m :]


def plain(net: ReversibleColumns) -> PlainColumns:
    net = copy.deepcopy(net)
    net.__class__ = PlainColumns
    return net


def assert_like_autograd(net: ReversibleColumns, x: Tensor, train: Train | None = None, **near: float) -> Result:
    """The taped modes give bit for bit what `store` gives, and `store`, in float64, what a plain loop gives."""
    expected = step(net, x, "store", train)
    for memory in ("recompute", "exact"):
        assert_same(step(net, x, memory, train), expected)
    net, x = copy.deepcopy(net).double(), x.detach().double().requires_grad_(x.requires_grad)
    loop = step(plain(net), x, train=train)
    near = near or {"rtol": 1e-9, "atol": 1e-9}
    for memory in ("store", "invert"):
        assert_near(step(net, x, memory, train), loop, **near)
    return expected


# --------------------------------------------------------------------------------------- what the tape does


@contextmanager
def tapes() -> Iterator[list[engine.Tape]]:
    """Collects every tape that the engine starts."""
    started: list[engine.Tape] = []

    class Spy(engine.Tape):
        def __init__(self, *args: Any):
            super().__init__(*args)
            started.append(self)

    original, engine.Tape = engine.Tape, Spy
    try:
        yield started
    finally:
        engine.Tape = original


def rebuilt_states(net: ReversibleColumns, x: Tensor, autocast: torch.dtype | None = None):
    """Pairs (name, state of the forward, state that the tape rebuilds for it), last state first."""
    indices = range(len(net.graph.nodes))
    torch.manual_seed(3)
    with tapes() as started, torch.autocast("cpu", autocast) if autocast else nullcontext():
        _, states = engine.run(net.graph, net.flat(), x, net.memory, {}, indices)
    (tape,) = started
    for index in reversed(indices):
        tape.move_to(index)
        for held in tape.window:
            yield net.graph.name(held), states[held].detach(), tape.window[held].tensor


# --------------------------------------------------------------------------------------- counts


MATMULS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "mkldnn_linear"}


class Matmuls(TorchDispatchMode):
    """Counts matrix products and convolutions."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.count += name in MATMULS or "scaled_dot_product" in name
        return func(*args, **(kwargs or {}))


class Kept(TorchDispatchMode):
    """Knows every storage that was made under it, without keeping any alive.

    Args:
        peak: keep `highest`, the most bytes that were alive at once, up to date.
    """

    def __init__(self, peak: bool = False):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = peak
        self.highest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        taken = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        known = {value.untyped_storage()._cdata for value in taken}
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in known:  # neither a view nor in place
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self.peak:
            self.highest = max(self.highest, self.bytes())
        return result

    def bytes(self) -> int:
        """Bytes of those that are still alive."""
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        return sum(nbytes for _, nbytes in self.storages.values())
