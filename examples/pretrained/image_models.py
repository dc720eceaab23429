"""Train a ViT and a ConvNeXt on Fashion-MNIST, make them reversible, and fine-tune them on handwritten digits.

    pip install 'revnets[vision]' && apt-get install dataset-fashion-mnist    # or a directory with the four idx files
    python examples/pretrained/image_models.py                                # about 5 CPU minutes, one thread
    python examples/pretrained/image_models.py --seeds 1 --updates 10 epochs=1 data.train_samples=640

Both networks are small timm models, trained by `revnets train fashion` from three seeds each. The first table shows the
effect of the conversion on Fashion-MNIST, before fine-tuning. Then each is fine-tuned on scikit-learn's digits, from
the same weights and with the same batches: the original, converted with several blends, with a blend that grows from 0
(BlendSchedule), and with learned blends. The output is in runs/pretrained. Running the command again reuses the trained
networks.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from _measures import (
    all_equal,
    gradients,
    memory_table,
    new_console,
    new_table,
    run_as_script,
    spread,
    step_bytes,
    steps,
)
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn

import revnets
from vision.config.run import load_config
from vision.training.loaded_run import LoadedRun, load_run
from vision.training.trainer import Trainer

REPO = Path(__file__).resolve().parents[2]
OUTPUT = Path(os.path.relpath(REPO / "runs" / "pretrained"))
ROOT = Path("/usr/share/datasets/fashion-mnist")

MODELS = {
    "ViT": "{timm: vit_tiny_patch16_224, img_size: 32, patch_size: 8, embed_dim: 64, depth: 12, num_heads: 4}",
    "ConvNeXt": "{timm: convnext_atto, patch_size: 2, dims: [16, 32, 64, 128], depths: [2, 2, 6, 2]}",
}
TRAINING = (
    "epochs=1",
    "data.train_samples=9600",
    "batch_size=32",
    "optimizer.lr=1e-3",
    "schedule.warmup_epochs=0.1",
    "label_smoothing=0",
    "data.shift=0",
    "data.rotate=0",
    "data.scale=0",
    "ema=null",
    "log_every=50",
)
"""Overrides of the recipe `fashion`."""

SIDE, TEST = 32, 397
"""Side of an image in pixels; number of test digits, of 1797."""


class Way(NamedTuple):
    """How to fine-tune the pretrained network."""

    blend: float | None = None  # None: the original network
    grows: bool = False  # whether the blend grows from 0 over the first half of the updates
    learned: bool = False


WAYS: Mapping[str, Way] = {
    "original": Way(),
    "b = 0.05": Way(0.05),
    "b = 0.1": Way(0.1),
    "b = 0.5": Way(0.5),
    "b from 0 to 0.5": Way(0.5, grows=True),
    "b learned from 0.1": Way(0.1, learned=True),
}


class Labeled(NamedTuple):
    """Images (N, 1, 32, 32) and their classes (N,)."""

    images: Tensor
    labels: Tensor


def trained_run(
    model: str, seed: int, root: Path, output: Path, overrides: Sequence[str], console: Console
) -> LoadedRun:
    """Train a network with the recipe `fashion`, or load it from an earlier call.

    Raises:
        revnets.SpecError: If the data is missing, or the directory contains a run with other settings.
    """
    folder = output / f"{model.lower()}-{seed}"
    words = [f"model={MODELS[model]}", *TRAINING, f"data.root={root.resolve()}", f"seed={seed}", f"output={folder}"]
    console.print(f"{model}, seed {seed}: {folder}")
    Trainer(load_config("fashion", [*words, *overrides]), Console(quiet=True)).fit()
    return load_run(folder)


def read_digits() -> tuple[Labeled, Labeled]:
    """Return training and test digits, upsampled from 8 x 8 and normalized."""
    pixels, classes = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear")
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    labels = torch.as_tensor(classes)
    test, train = order[:TEST], order[TEST:]
    return Labeled(images[train], labels[train]), Labeled(images[test], labels[test])


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """Predict classes (N,) in evaluation mode."""
    model.eval()
    return torch.cat([model(part).argmax(1) for part in images.split(100)])


def accuracy(model: nn.Module, data: Labeled) -> float:
    """Compute top-1 accuracy in percent."""
    return 100 * float((predictions(model, data.images) == data.labels).float().mean())


def converted(trained: nn.Module, way: Way) -> nn.Module:
    """Return a copy of the pretrained network, converted if `way` has a blend."""
    model = copy.deepcopy(trained)
    if way.blend is None:
        return model
    return revnets.make_reversible(model, way.blend, learn_blend=way.learned)


def fine_tuned(trained: nn.Module, way: Way, train: Labeled, updates: int, seed: int, label: str) -> nn.Module:
    """Fine-tune a copy with a new classifier; the seed determines batches and classifier."""
    model: Any = converted(trained, way)
    schedule = revnets.BlendSchedule(model, max(1, updates // 2)) if way.grows else None
    torch.manual_seed(seed)
    model.reset_classifier(10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    model.train()
    for _ in steps(range(updates), f"{label}, seed {seed}"):
        chosen = torch.randint(0, len(train.labels), (32,))
        optimizer.zero_grad()
        F.cross_entropy(model(train.images[chosen]), train.labels[chosen]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return model


def main(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides of the training, key.path=value: epochs=10", show_default=False),
    ] = None,
    only: Annotated[str, typer.Option(help="Comma-separated networks.")] = ",".join(MODELS),
    root: Annotated[Path, typer.Option(help="Directory with the four idx files, gzipped or not.")] = ROOT,
    output: Annotated[Path, typer.Option(help="Directory of the trained networks.")] = OUTPUT,
    seeds: Annotated[int, typer.Option(min=1, help="Number of networks of each kind.")] = 3,
    updates: Annotated[int, typer.Option(min=1, help="Updates of each fine-tuning, with 32 digits each.")] = 30,
    images: Annotated[int, typer.Option(min=2, help="Images of Fashion-MNIST for the comparison.")] = 1000,
) -> None:
    """Train a ViT and a ConvNeXt, make them reversible in several ways, and fine-tune each on digits."""
    names = [word.strip() for word in only.split(",")]
    if unknown := sorted(set(names) - set(MODELS)):
        raise typer.BadParameter(f"{unknown[0]!r}: choose from {', '.join(MODELS)}", param_hint="--only")
    console = new_console()
    train, test = read_digits()
    for name in names:
        runs = [trained_run(name, seed, root, output, overrides or [], console) for seed in range(seeds)]
        clothes = Labeled(*next(iter(runs[0].val_batches(images, 1))))
        console.print(fidelity_table(name, [run.model for run in runs], clothes))
        console.print(memory_of(name, runs[0].model, Labeled(train.images[:32], train.labels[:32])))
        title = f"{name}: accuracy on digits after {updates} updates, {seeds} seeds"
        table = new_table(title, "", "accuracy", "learned b")
        for label, way in WAYS.items():
            models = [
                fine_tuned(run.model, way, train, updates, seed, f"{name}, {label}") for seed, run in enumerate(runs)
            ]
            found = spread([accuracy(model, test) for model in models], 1)
            console.print(f"{name}, {label}: {found} %")
            table.add_row(label, f"{found} %", learned_range(models) if way.learned else "")
        console.print(table)


def fidelity_table(name: str, models: Sequence[nn.Module], data: Labeled) -> Any:
    """Return accuracy and equal predictions on Fashion-MNIST, before fine-tuning."""
    table = new_table(
        f"{name}: {len(data.labels)} images of Fashion-MNIST, no training", "", "accuracy", "equal predictions"
    )
    table.add_row("original", f"{spread([accuracy(model, data) for model in models], 1)} %", "")
    before = [predictions(model, data.images) for model in models]
    for blend in (0.05, 0.1, 0.5):
        rewired = [converted(model, Way(blend)) for model in models]
        after = [predictions(model, data.images) for model in rewired]
        equal = [100 * float((old == new).float().mean()) for old, new in zip(before, after, strict=True)]
        correct = [100 * float((found == data.labels).float().mean()) for found in after]
        table.add_row(f"b = {blend:g}", f"{spread(correct, 1)} %", f"{spread(equal, 1)} %")
    return table


def memory_of(name: str, trained: nn.Module, data: Labeled) -> Any:
    """Return the memory of a training step of the original, and of the conversion in `store` and in `exact`."""
    model = converted(trained, Way()).train()
    rows = [("original", step_bytes(model, lambda: F.cross_entropy(model(data.images), data.labels)))]
    equal = True
    for blend in (0.05, 0.1, 0.5):
        rewired = converted(trained, Way(blend)).train()
        loss = lambda net=rewired: F.cross_entropy(net(data.images), data.labels)  # noqa: E731
        revnets.find_columns(rewired).memory = "store"
        stored = gradients(rewired, loss)
        if blend == 0.05:
            rows.append(("converted, store", step_bytes(rewired, loss)))
        revnets.find_columns(rewired).memory = "exact"
        rows.append((f"b = {blend:g}, exact", step_bytes(rewired, loss)))
        equal = equal and all_equal(stored, gradients(rewired, loss))
    words = "equal" if equal else "DIFFERENT"
    return memory_table(f"{name}: a step of {len(data.labels)} images; gradients of exact and store: {words}", rows)


def learned_range(models: Sequence[nn.Module]) -> str:
    """Format the smallest and the largest of all learned blends."""
    values = [
        float(weight.detach())
        for model in models
        for key, weight in model.named_parameters()
        if key.endswith("blend.weight")
        for weight in weight.flatten()
    ]
    return f"{min(values):.3f} to {max(values):.3f}"


if __name__ == "__main__":
    run_as_script(main)
