"""RevViT from an ordinary transformer block: attention and MLP alternate as F_t in x_t = F_t(x_(t-1)) + x_(t-2).

    python examples/quickstart/revvit.py                     # --help lists the options

Only the two halves of the block are defined here; `ReversibleSequence` rebuilds their inputs in backward. The script
compares gradients and the memory saved for backward with those of ordinary autograd.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import typer
from torch import Tensor, nn

from revnets import ReversibleSequence
from revnets.memory.tracker import kept_bytes


class Attention(nn.Module):
    """First half of a pre-norm transformer block, without the shortcut, which x_(t-2) replaces."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=False)[0]


class MLP(nn.Sequential):
    """Second half, without the shortcut."""

    def __init__(self, dim: int):
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


def halves(depth: int, dim: int, heads: int) -> list[nn.Module]:
    """Return two identities, so that both streams start as the input (Mangalam et al., 2022), and the blocks."""
    blocks = [half for _ in range(depth) for half in (Attention(dim, heads), MLP(dim))]
    return [nn.Identity(), nn.Identity(), *blocks]


class Plain(nn.Module):
    """The same functions under ordinary autograd."""

    def __init__(self, functions: Iterable[nn.Module]):
        super().__init__()
        self.functions = nn.ModuleList(functions)

    def forward(self, x: Tensor) -> list[Tensor]:
        before, now = x, x
        for function in self.functions[2:]:
            before, now = now, function(now) + before
        return [before, now]


def gradients(net: nn.Module, tokens: Tensor) -> list[Tensor]:
    loss = torch.stack(net(tokens)).mean(0).square().mean()  # averages both streams, as in RevViT
    return list(torch.autograd.grad(loss, list(net.parameters())))


def main(depth: int = 12, dim: int = 192, heads: int = 3) -> None:
    """Compare gradients and memory of a reversible transformer with those of ordinary autograd."""
    torch.manual_seed(0)
    functions = halves(depth, dim, heads)
    reversible, plain = ReversibleSequence(functions, m=2), Plain(functions)
    tokens = torch.randn(4, 196, dim)
    pairs = zip(gradients(reversible, tokens), gradients(plain, tokens), strict=True)
    if not all(torch.equal(ours, theirs) for ours, theirs in pairs):
        raise SystemExit("the gradients differ from those of ordinary autograd")
    print(f"{depth} blocks, dim {dim}, tokens {tuple(tokens.shape)}: gradients are equal bit for bit")
    for name, net in (("ordinary autograd", plain), ("reversible", reversible)):
        print(f"{name:>18} saves {kept_bytes(net, tokens) / 2**20:7.1f} MiB for backward")


if __name__ == "__main__":
    typer.run(main)
