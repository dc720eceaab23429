"""Two tasks other than classification: the brightness of an image, and a detector that computes its own losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from vision.data.dataset import DataSplits
from vision.data.samplers import Key
from vision.distributed.context import World
from vision.tasks import Task


class Brightness(Task):
    """The brightness of an image. Batches are mappings; the evaluator uses the predictions of all processes together.

    Args:
        scale: Brightness of a white image.
    """

    monitor, label, unit, digits = "mae", "error", "levels", 3

    def __init__(self, config: Any, scale: float = 10.0):
        super().__init__(config)
        self.scale = scale

    def load_data(self, notes: Path | None = None, world: World | None = None) -> Any:
        """Load digits, with an odd number for validation, so that two processes need a sample that does not count."""
        data = super().load_data(notes, world)
        return replace(data, val=Subset(data.val, range(len(data.val) - 1)))

    def collate(self, samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        images = torch.stack([image for image, _ in samples])
        return {"images": images, "brightness": self.scale * images.mean((1, 2, 3))}

    def padding(self, sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.full_like(sample[0], torch.nan), sample[1]

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return F.mse_loss(model(batch["images"])[:, 0], batch["brightness"])

    def predict(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["images"])[:, 0]

    def evaluator(self, model: nn.Module, data: Any, device: torch.device) -> Errors:
        return Errors()


class Errors:
    """Mean absolute error, and the median, which no process can compute alone."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    def update(self, output: Tensor, batch: Mapping[str, Tensor]) -> None:
        counts = ~batch["brightness"].isnan()
        self.errors += (output - batch["brightness"])[counts].abs().tolist()

    def compute(self, world: World) -> dict[str, float]:
        errors = torch.tensor([error for share in world.collect(self.errors) for error in share], dtype=torch.float64)
        return {"mae": errors.mean().item(), "median": errors.median().item(), "count": float(len(errors))}


class Spots(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Dark images of several sizes with one bright pixel each, and its position from -1 to 1."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: Key | int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed + (key.index if isinstance(key, Key) else key))
        height, width = (int(torch.randint(6, 10, (), generator=generator)) for _ in range(2))
        y, x = (int(torch.randint(size, (), generator=generator)) for size in (height, width))
        image = torch.zeros(1, height, width)
        image[0, y, x] = 1
        return image, {"point": torch.tensor([2 * y / (height - 1) - 1, 2 * x / (width - 1) - 1])}


class SpotFinder(nn.Module):
    """Accepts a list of images of any size. In training, it accepts targets and returns losses by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        points = self.layers(torch.stack([F.adaptive_max_pool2d(image, 8) for image in images]))
        if targets is None:
            return [{"point": point} for point in points]
        errors = (points - torch.stack([target["point"] for target in targets])).square().mean(0)
        return {"loss_y": errors[0], "loss_x": 2 * errors[1]}


class SpotDetection(Task):
    """A task with custom data, batches and model, as for detectors of torchvision. It ignores the key `data`.

    Args:
        length: Number of training images.
    """

    monitor, mode, samples = "found", "max", ("scenes", "scn")

    def __init__(self, config: Any, *, length: int):
        super().__init__(config)
        self.length = length

    def load_data(self, notes: Path | None = None, world: World | None = None) -> DataSplits:
        return DataSplits(Spots(self.length, 0), Spots(40, 10_000))

    def collate(self, samples: list[Any]) -> tuple[list[Any], ...]:
        return tuple(map(list, zip(*samples, strict=True)))

    def build_model(self, data: DataSplits) -> nn.Module:
        return SpotFinder()

    def loss(self, model: nn.Module, batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> dict[str, Tensor]:
        return model(*batch)

    def evaluator(self, model: nn.Module, data: DataSplits, device: torch.device) -> Found:
        return Found()


class Found:
    """The fraction of spots found within a quarter of the image."""

    def __init__(self) -> None:
        self.found, self.count = 0, 0

    def update(self, output: list[dict[str, Tensor]], batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> None:
        for guess, target in zip(output, batch[1], strict=True):
            self.found += int((guess["point"] - target["point"]).abs().max() < 0.5)
            self.count += 1

    def compute(self, world: World) -> dict[str, float]:
        return {"found": world.sum(self.found) / world.sum(self.count)}
