"""Train an encoder-decoder of reversible columns to fill in masked patches of scanned digits (scikit-learn's, 8 x 8).

    python examples/quickstart/masked_digits.py [key=value ...]  # overrides of masked_digits.yaml, such as columns.up=4

Prints the error at masked pixels of held-out images, compared with that of the mean image, and the memory saved for
backward in `store` and in `exact`. Draws some of the images to runs/masked_digits.png. Takes one CPU minute.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import revnets
from revnets.memory.tracker import kept_bytes
from revnets.plotting.style import save
from revnets.utils.format import size

SPEC = Path(__file__).with_suffix(".yaml")
PATCH, MASKED = 2, 10  # side in pixels; masked patches, of 16
BATCH, LR = 64, 5e-3


class MaskedAutoencoder(nn.Module):
    """Reversible columns with a linear layer from level 0 of the last column to pixels."""

    def __init__(self, net: revnets.Net):
        super().__init__()
        self.net = net
        dim = net.spec.levels[0].dim
        self.pixels = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, PATCH**2))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 2, 8, 8), pixels and their visibility mask, to images (B, 1, 8, 8)."""
        levels = self.net(x)
        return F.fold(self.pixels(levels[0].flatten(1, 2)).transpose(1, 2), x.shape[-2:], PATCH, stride=PATCH)


def masked(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mask `MASKED` random patches of images (B, 1, 8, 8).

    Returns:
        Input (B, 2, 8, 8) with masked pixels and the visibility mask, and the mask of hidden pixels (B, 1, 8, 8).
    """
    side = images.shape[-1] // PATCH
    ranks = torch.rand(len(images), side**2, generator=generator).argsort(1).argsort(1)
    hidden = (ranks < MASKED).view(-1, 1, side, side)
    hidden = hidden.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    return torch.cat([images * ~hidden, (~hidden).to(images)], 1), hidden


def error(found: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error at masked pixels."""
    return (found - images)[hidden].square().mean()


def train(model: nn.Module, images: Tensor, epochs: int) -> Iterator[float]:
    """Train and yield the mean loss of each epoch."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.05)
    steps = -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, epochs * steps)
    for _ in range(epochs):
        total = 0.0
        for batch in images[torch.randperm(len(images), generator=generator)].split(BATCH):
            x, hidden = masked(batch, generator)
            loss = error(model(x), batch, hidden)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        yield total / len(images)


def picture(images: Tensor, x: Tensor, found: Tensor, hidden: Tensor) -> Figure:
    """Draw three rows: images, masked inputs, and inputs with predictions at masked pixels."""
    seen = x[:, :1].masked_fill(hidden, 0.5)
    figure = Figure(figsize=(0.6 * len(images), 1.9), layout="constrained", facecolor="white")
    axes = figure.subplots(3, len(images), squeeze=False)
    for row, pixels in zip(axes, (images, seen, found.where(hidden, images)), strict=True):
        for cell, image in zip(row, pixels, strict=True):
            cell.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
            cell.axis("off")
    return figure


def main(overrides: Sequence[str] = (), epochs: int = 25, output: Path = Path("runs/masked_digits.png")) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.as_tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    images, others = images[:1437], images[1437:]  # the last fifth is from other writers
    model = MaskedAutoencoder(revnets.build(SPEC, overrides))
    columns = model.net.columns
    print(f"{columns.graph.columns} columns, {sum(weight.numel() for weight in model.parameters()):,} parameters")
    for epoch, loss in enumerate(train(model, images, epochs), 1):
        if epoch % 5 == 0 or epoch == epochs:
            print(f"epoch {epoch:3d}  loss {loss:.4f}")
    x, hidden = masked(others, torch.Generator().manual_seed(1))
    model.eval()
    with torch.no_grad():
        found = model(x)
    mean = images.mean(0).expand_as(others)
    print(f"error at masked pixels of {len(others)} held-out images: {error(found, others, hidden):.4f}")
    print(f"error of the mean image: {error(mean, others, hidden):.4f}")
    for mode in ("store", "exact"):
        columns.memory = mode
        print(f"{mode} saves {size(kept_bytes(model, x[:BATCH]))} for backward of a batch of {BATCH}")
    output.parent.mkdir(parents=True, exist_ok=True)
    save(picture(others[:16], x[:16], found[:16], hidden[:16]), output)
    print(f"figure: {output}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except revnets.SpecError as wrong:
        sys.exit(f"error: {wrong}")
