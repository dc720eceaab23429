"""The commands `revnets train`, `eval`, `predict`, `reshard` and `convert`. Heavy imports wait until a command runs."""

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
        str, typer.Argument(help=f"YAML file of a run, or a recipe that comes along: {RECIPES}.", show_default=False)
    ],
    overrides: Overrides = None,
) -> None:
    """Train a model, by default for image classification, or go on with an interrupted run.

    Everything goes into the folder `output`: checkpoints/, log.jsonl,
    tensorboard/, curves.png and config.yaml. The same command again goes on
    where the run stopped, bit for bit. SIGTERM and Ctrl-C save first; the exit
    code is then 128 + the signal.

    A YAML file is a program: the classes that it names are imported and run.

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
            help="A checkpoint, or the folder of a run: then its best one.", show_default=False, readable=False
        ),
    ],
    overrides: Overrides = None,
    png: Annotated[
        Path | None,
        typer.Option(help="Draw the confusion matrix into a .png, .svg or .pdf file.", readable=False),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="For weights alone, official ones too: the recipe of their model and data.")
    ] = None,
    subset: Annotated[
        bool, typer.Option("--subset", help="The data have some of the model's classes: match them by their names.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Evaluate a checkpoint on the validation set of its run: its weights, and their average if there is one.

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
            help="A checkpoint, or the folder of a run: then its best one.", show_default=False, readable=False
        ),
    ],
    images: Annotated[list[Path], typer.Argument(help="Files of pictures.", show_default=False, readable=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for pictures and predictions.json.", readable=False),
    ] = None,
    score: Annotated[float, typer.Option(min=0, max=1, help="Least score of the objects that are drawn.")] = 0.5,
    weights: Annotated[
        Literal["auto", "raw", "ema"], typer.Option(help="auto: averaged over training if the run kept them.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    trust: Trust = False,
) -> None:
    """Show what a trained model finds in pictures.

    Detectors draw boxes, masks, names and scores, and write predictions.json
    in COCO's format. Segmenters draw the class of every pixel beside a legend.
    Of classifiers the five best classes are printed.

    revnets predict runs/mine photos/*.jpg -o predictions
    """
    with reported():
        from vision.cli.predict import predict_files

        predict_files(checkpoint, images, output, score, weights, device, trust)


def reshard(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint: a .pt file, or a step-N folder.", show_default=False, readable=False)
    ],
    target: Annotated[
        Path, typer.Argument(help="What to write: a new file, or a new folder.", show_default=False, readable=False)
    ],
    shards: Annotated[int, typer.Option(min=0, help="Number of shards; 0: one whole file.")] = 0,
) -> None:
    """Rewrite a checkpoint of `checkpoint: sharded` as one file, or one file as shards."""
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
            help="A new file: .safetensors for ours, .pth for the official layout.", show_default=False, readable=False
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="What it should be, as revcol_tiny. By default the shapes tell.")
    ] = None,
    weights: Annotated[
        Literal["raw", "ema"], typer.Option(help="The model's, or their average over training.")
    ] = "raw",
    heads: Annotated[
        bool, typer.Option("--heads", help="Keep classifiers and decoders of intermediate supervision.")
    ] = False,
    layout: Annotated[
        Literal["classification", "detection", "segmentation"], typer.Option(help="What a .pth is for.")
    ] = "classification",
    allow: Annotated[
        list[str] | None,
        typer.Option(help="A name, or a pattern as 'neck2.*', that need not fit and is left out. May be repeated."),
    ] = None,
) -> None:
    """Convert official RevCol checkpoints to ours, and ours to the official layout.

    Every name in the file is accounted for: what is missing, unexpected or of
    another shape is listed, and nothing is written unless --allow names it.
    Files are read without running what they hold. Of a detector or segmenter
    only the backbone is taken. docs/guides/pretrained-weights.md tells more.

    revnets convert revcol_tiny_1k.pth revcol_tiny.safetensors
    """
    with reported():
        from vision.weights.convert import convert_file

        convert_file(source, target, layout, model, weights, heads, allow or [])
