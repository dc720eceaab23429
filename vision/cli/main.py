"""The commands `train`, `eval`, `predict`, `reshard` and `convert`. Slow imports are deferred until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from revnets.cli.options import Trust
from vision.cli.common import Overrides, reported
from vision.paths import CONFIGS

RECIPES = ", ".join(path.stem for path in (*sorted(CONFIGS.glob("*.yaml")), *sorted(CONFIGS.glob("finetune/*.yaml"))))


def train(
    config: Annotated[
        str, typer.Argument(help=f"YAML file of a run, or a built-in recipe: {RECIPES}.", show_default=False)
    ],
    overrides: Overrides = None,
) -> None:
    """Train a model, by default for image classification, or resume an interrupted run.

    Writes to the directory `output`: checkpoints/, log.jsonl, tensorboard/,
    curves.png and config.yaml. Running the same command again resumes the run
    bit for bit. SIGTERM and Ctrl-C save a checkpoint first; the exit code is
    then 128 + the signal.

    A YAML file can run code: the classes that it names are imported.

    Several processes: torchrun --no-python --nproc-per-node 8 revnets train CONFIG.
    """
    with reported():
        from vision.config.run import load_config
        from vision.distributed.context import joined
        from vision.training.trainer import Trainer

        settings = load_config(config, overrides or [])
        with joined(settings.device) as world:
            outcome = Trainer(settings, world=world).fit()
    if outcome.signal is not None:
        raise typer.Exit(128 + outcome.signal)
    if world.is_main:
        typer.echo(f"best {outcome.text}, {outcome.best or outcome.last}")


def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint, or the directory of a run (its best one).", show_default=False, readable=False
        ),
    ],
    overrides: Overrides = None,
    png: Annotated[
        Path | None,
        typer.Option(help="Write the confusion matrix to a .png, .svg or .pdf file.", readable=False),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="For files with only weights: the recipe of their model and data.")
    ] = None,
    subset: Annotated[
        bool, typer.Option("--subset", help="The data has a subset of the model's classes; match them by name.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Evaluate the weights of a checkpoint, and their average if there is one, on the validation set of the run.

    A configuration that names code of other projects, such as a custom task, needs --trust.

    Weights of ImageNet-22K on ImageNet-1K, matched by WordNet ids:
    revnets eval revcol_base_22k.pth data.root=DIR --config revcol_base_in22k --subset
    """
    with reported():
        from vision.cli.evaluate import evaluate_checkpoint

        evaluate_checkpoint(checkpoint, overrides or [], png, config, subset, trust)


def predict(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint, or the directory of a run (its best one).", show_default=False, readable=False
        ),
    ],
    images: Annotated[list[Path], typer.Argument(help="Image files.", show_default=False, readable=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory for images and predictions.json.", readable=False),
    ] = None,
    score: Annotated[float, typer.Option(min=0, max=1, help="Minimum score of drawn objects.")] = 0.5,
    weights: Annotated[
        Literal["auto", "raw", "ema"], typer.Option(help="auto: the averaged ones (ema) if there are any, else raw.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    trust: Trust = False,
) -> None:
    """Predict with a trained model on image files.

    Detectors draw boxes, masks, names and scores, and write predictions.json
    in COCO's format. Segmenters draw the class of every pixel next to a legend.
    Classifiers print the five most likely classes.

    revnets predict runs/mine photos/*.jpg -o predictions
    """
    with reported():
        from vision.cli.predict import predict_files

        predict_files(checkpoint, images, output, score, weights, device, trust)


def reshard(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint: a .pt file or a step-N directory.", show_default=False, readable=False)
    ],
    target: Annotated[Path, typer.Argument(help="The new file or directory.", show_default=False, readable=False)],
    shards: Annotated[int, typer.Option(min=0, help="Number of shards; 0 for one file.")] = 0,
) -> None:
    """Convert a sharded checkpoint to one file, or one file to shards."""
    with reported():
        from vision.checkpoints import reshard as resharding

        resharding.reshard(source, target, shards)
    typer.echo(f"wrote {target}")


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="An official .pth, a checkpoint of revnets train, or .safetensors.", show_default=False, readable=False
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            help="A new file: .safetensors for our layout, .pth for the official one.",
            show_default=False,
            readable=False,
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Name of the model, such as revcol_tiny. By default found by the shapes.")
    ] = None,
    weights: Annotated[
        Literal["raw", "ema"], typer.Option(help="The model's weights, or their average over training.")
    ] = "raw",
    heads: Annotated[
        bool, typer.Option("--heads", help="Keep classifiers and decoders of intermediate supervision.")
    ] = False,
    layout: Annotated[
        Literal["classification", "detection", "segmentation"], typer.Option(help="Layout of a .pth file.")
    ] = "classification",
    allow: Annotated[
        list[str] | None,
        typer.Option(help="Omit tensors of this name, or pattern such as 'neck2.*', that do not fit. Repeatable."),
    ] = None,
) -> None:
    """Convert official RevCol checkpoints to our layout, and ours to the official one.

    Every name in the file is checked: missing, unexpected and misshapen tensors
    are listed, and nothing is written unless --allow names them. Files are read
    without executing their content. Only the backbone of a detector or
    segmenter is converted. See docs/guides/pretrained-weights.md.

    revnets convert revcol_tiny_1k.pth revcol_tiny.safetensors
    """
    with reported():
        from vision.weights.convert import convert_file

        convert_file(source, target, layout, model, weights, heads, allow or [])
