"""Compare RevCol-Transformer with fairseq's transformer of equal size, in fairseq's trainer.

    .venv/bin/python examples/benchmarks/translation.py                     # a quarter of the paper's widths
    .venv/bin/python examples/benchmarks/translation.py --scale 2 --rounds 5 --png out/nlp.png

Prints CPU seconds per update (user and system, medians of interleaved rounds, one thread), target tokens per CPU
second, parameters, and the bytes that both encoders save for backward at several depths, all from one run. The text is
synthetic: random words, in sentences as long as those of WMT.
"""

from __future__ import annotations

import logging
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from revnets.memory.tracker import kept_bytes
from revnets.utils.format import table_of

NLP = Path(__file__).parents[2] / "nlp"
TYPES = 6000  # vocabulary size, about a fifth of a WMT vocabulary
UNDER = "RevCol, transformer's peak"
"""RevCol that stores as much as fits below the peak of a transformer step."""


class Contender:
    """A model in fairseq's trainer, built as by `fairseq-train`."""

    def __init__(self, name: str, data: Path, tokens: int, *arguments: object):
        from fairseq import options, tasks
        from fairseq.dataclass.utils import convert_namespace_to_omegaconf
        from fairseq.trainer import Trainer

        given = [data, "--user-dir", NLP, "--cpu", "--share-all-embeddings", "--max-tokens", tokens, "--num-workers", 0]
        given += [
            "--optimizer",
            "adam",
            "--lr",
            0.0005,
            "--dropout",
            0.1,
            "--criterion",
            "label_smoothed_cross_entropy",
        ]
        given += ["--label-smoothing", 0.1, "--no-progress-bar", *arguments]
        args = options.parse_args_and_arch(options.get_training_parser(), [str(part) for part in given])
        self.cfg = convert_namespace_to_omegaconf(args)
        self.task = tasks.setup_task(self.cfg.task)
        self.task.load_dataset("train")
        torch.manual_seed(0)
        self.model: Any = self.task.build_model(self.cfg.model)
        self.trainer = Trainer(self.cfg, self.task, self.model, self.task.build_criterion(self.cfg.criterion))
        self.name = name
        self.seconds: list[float] = []

    def batches(self, count: int) -> list[Any]:
        """Return the first batches of an epoch, which are the same for all models."""
        return list(islice(self.trainer.get_train_iterator(epoch=1).next_epoch_itr(shuffle=True), count))

    def update(self, batch: Any) -> None:
        start = time.process_time()
        self.trainer.train_step([batch])
        self.seconds.append(time.process_time() - start)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def flops(self, batches: list[Any]) -> float:
        """Compute the mean FLOPs of a forward over batches; a multiply-add counts as two."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for batch in batches:
                self.model(**batch["net_input"])
        return counter.get_total_flops() / len(batches)

    def peak(self) -> int:
        """Estimate the peak bytes of a training step of the largest batch, as for `--revcol-memory '{budget: ...}'`."""
        from nlp.models.memory_budget import footprint

        return footprint(self.model, self.cfg.model, self.task)

    def kept(self, batch: Any) -> int:
        """Count the bytes that the encoder saves for backward."""
        return kept_bytes(self.model.encoder, batch["net_input"]["src_tokens"])


def sizes(scale: int, factor: int = 1) -> dict[str, tuple[object, ...]]:
    """Return the arguments of both models: the paper's widths times scale / 4, and its depth times `factor`."""

    def width(dim: int, heads: int) -> tuple[object, ...]:
        sides = ((f"--{side}-embed-dim", dim, f"--{side}-ffn-embed-dim", 4 * dim) for side in ("encoder", "decoder"))
        counts = ((f"--{side}-attention-heads", heads) for side in ("encoder", "decoder"))
        return tuple(item for pair in (*sides, *counts) for item in pair)

    return {
        "transformer": ("--arch", "transformer", *width(256 * scale, 4 * scale), "--encoder-layers", 6 * factor),
        "revcol": ("--arch", "revcol_transformer", *width(192 * scale, 3 * scale), "--revcol-columns", 4 * factor),
    }


def write_data(folder: Path, sentences: int) -> Path:
    """Write a fairseq data set of random words: sources of 8 to 50 words, targets up to 20 % shorter or longer."""
    from fairseq_cli import preprocess

    rng = random.Random(0)
    sources = [rng.randint(8, 50) for _ in range(sentences)]
    targets = [round(length * rng.uniform(0.8, 1.2)) for length in sources]
    for language, lengths in (("en", sources), ("de", targets)):
        lines = (" ".join(f"w{rng.randrange(TYPES)}" for _ in range(length)) for length in lengths)
        (folder / f"train.{language}").write_text("\n".join(lines) + "\n")
    command = [
        "--source-lang",
        "en",
        "--target-lang",
        "de",
        "--trainpref",
        str(folder / "train"),
        "--joined-dictionary",
    ]
    with mock.patch.object(sys, "argv", ["fairseq-preprocess", *command, "--destdir", str(folder / "bin")]):
        preprocess.cli_main()
    return folder / "bin"


def main(
    scale: Annotated[int, typer.Option(min=1, max=4, help="Width in quarters; 4 is the paper's width.")] = 1,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens per batch (--max-tokens).")] = 2000,
    rounds: Annotated[int, typer.Option(min=1, help="Timed updates of each model.")] = 5,
    png: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Compare the time of an update and the memory saved for backward."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # about 15 lines by fairseq on deprecated interfaces
    logging.disable(logging.INFO)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder), sentences=60 * tokens // 100)
        speed = compare(data, scale, tokens, rounds)
        console.print(speed_table(speed, scale, tokens))
        memory = {factor * 4: keep(data, scale, tokens, factor) for factor in (1, 2, 4)}
        console.print(memory_table(memory))
    console.print(f"torch {torch.__version__}, 1 thread of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if png is not None:
        draw(speed, memory, png)
        console.print(f"wrote {png}", highlight=False, markup=False, soft_wrap=True)


class Row(NamedTuple):
    """Medians over updates. Rates are compared per update, because batches and machine load vary."""

    seconds: float  # CPU seconds per update
    rate: float  # target tokens per CPU second
    parameters: int
    flops: float  # FLOPs of a forward
    of_transformer: float  # rate relative to the transformer
    of_store: float  # seconds relative to store


def compare(data: Path, scale: int, tokens: int, rounds: int) -> dict[str, Row]:
    arguments = sizes(scale)
    contenders = [
        Contender("transformer", data, tokens, *arguments["transformer"]),
        *(
            Contender(f"RevCol, {memory}", data, tokens, *arguments["revcol"], "--revcol-memory", memory)
            for memory in ("store", "exact")
        ),
    ]
    budget = f"{{budget: {contenders[0].peak()}}}"
    contenders.append(Contender(UNDER, data, tokens, *arguments["revcol"], "--revcol-memory", budget))
    batches = contenders[0].batches(rounds + 1)
    for number, batch in enumerate(track(batches, description="updates", transient=True)):
        for contender in contenders:
            contender.update(batch)
        if number == 0:  # creates the optimizer state and selects kernels
            for contender in contenders:
                contender.seconds.clear()
    words = [batch["ntokens"] for batch in batches[1:]]
    transformer, store = contenders[:2]

    def times(one: Contender, other: Contender) -> float:
        return statistics.median(a / b for a, b in zip(one.seconds, other.seconds, strict=True))

    return {
        each.name: Row(
            statistics.median(each.seconds),
            statistics.median(count / seconds for count, seconds in zip(words, each.seconds, strict=True)),
            each.parameters,
            each.flops(batches[1:]),
            times(transformer, each),
            times(each, store),
        )
        for each in contenders
    }


def keep(data: Path, scale: int, tokens: int, factor: int) -> dict[str, int]:
    """Count the bytes that each encoder saves for backward, at `factor` times the paper's depth."""
    arguments = sizes(scale, factor)
    transformer = Contender("transformer", data, tokens, *arguments["transformer"])
    revcol = Contender("RevCol", data, tokens, *arguments["revcol"])
    batch = transformer.batches(1)[0]
    kept = {"transformer": transformer.kept(batch)}
    for memory in ("store", "exact"):
        revcol.model.encoder.columns.memory = memory
        kept[f"RevCol, {memory}"] = revcol.kept(batch)
    return kept


def speed_table(speed: dict[str, Row], scale: int, tokens: int) -> Table:
    headings = ("model", "weights", "GFLOP", "CPU s", "x store", "tokens/s", "x first")
    table = table_of(f"{scale}/4 of the paper's widths, --max-tokens {tokens}", headings, left=1)
    for name, row in speed.items():
        sizes = (f"{row.parameters / 1e6:.1f} M", f"{row.flops / 1e9:.1f}")
        of_store = "" if name == "transformer" else f"{row.of_store:.2f}"
        table.add_row(name, *sizes, f"{row.seconds:.2f}", of_store, f"{row.rate:.0f}", f"{row.of_transformer:.2f}")
    table.caption = (
        f"GFLOP of a forward; CPU s of an update, in exact {speed['RevCol, exact'].of_store:.2f} times that in store; "
        "target tokens per CPU second"
    )
    return table


def memory_table(memory: dict[int, dict[str, int]]) -> Table:
    headings = ("columns (layers)", *next(iter(memory.values())))
    table = table_of("MB saved for backward by the encoder", headings, left=1)
    for columns, kept in memory.items():
        table.add_row(f"{columns} ({columns * 6 // 4})", *(f"{size / 1e6:.1f}" for size in kept.values()))
    return table


def draw(speed: dict[str, Row], memory: dict[int, dict[str, int]], path: Path) -> None:
    """Plot tokens per second, and saved bytes against the number of columns."""
    from matplotlib.figure import Figure

    from revnets.plotting.style import save

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.barh(list(speed)[::-1], [row.rate for row in speed.values()][::-1])
    left.set(xlabel="target tokens per CPU second")
    for name in next(iter(memory.values())):
        right.plot(list(memory), [kept[name] / 1e6 for kept in memory.values()], marker="o", label=name)
    right.set(xlabel="columns", ylabel="MB saved by the encoder", ylim=(0, None))
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


if __name__ == "__main__":
    typer.run(main)
