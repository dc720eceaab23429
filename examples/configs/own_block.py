"""A custom block for own_block.yaml. Any module that preserves the shape of its input works."""

from __future__ import annotations

from torch import Tensor, nn

from revnets.nn.blocks import DropPath


class GatedConvBlock(nn.Module):
    """A depthwise convolution that gates another branch: local attention without attention.

    States are (B, H, W, C), channels last. PyTorch's convolutions need (B, C, H, W); both permutations are views.

    Args:
        dim: Channels, passed to every block.
        kernel_size: Odd. Options with annotations are checked when the YAML is read.
        expand: Width of the branches in units of `dim`.
        drop_path: Set from the network's `drop_path`, because of its name.
    """

    def __init__(self, dim: int, kernel_size: int = 7, expand: int = 2, drop_path: float = 0.0):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} changes the image size. Use an odd number")
        width = expand * dim
        self.norm = nn.LayerNorm(dim)
        self.inp = nn.Linear(dim, 2 * width)
        self.conv = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.out = nn.Linear(width, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.inp(self.norm(x)).chunk(2, dim=-1)
        gate = self.conv(gate.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path(self.out(value * gate.sigmoid()))
