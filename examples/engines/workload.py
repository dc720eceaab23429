"""Models, data in a fixed order, and the comparison of `exact` with `store` for all engines.

Two micro-batches make an update, so one process that accumulates gradients and two processes that average them do the
same arithmetic: a sum of two, and a division by 2, which is exact.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import revnets
from revnets.engine.columns import ReversibleColumns
from revnets.memory.tracker import kept_bytes

FOLDER = Path(__file__).resolve().parent
TEXT = FOLDER.parent / "data" / "kjv-elberfelder-short.en-de.tsv.gz"
MICRO_BATCH = 8
ACCUMULATE = 2
"""Micro-batches per update."""
LEARNING_RATE = 1e-3

# --------------------------------------------------------------------------------------- data


class Samples(Dataset[dict[str, Tensor]]):
    """Inputs of a model by argument name, repeated to the number of samples that the updates need."""

    def __init__(self, columns: dict[str, Tensor], steps: int):
        count = steps * ACCUMULATE * MICRO_BATCH
        self.columns = {name: values[torch.arange(count) % len(values)] for name, values in columns.items()}
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.columns.items()}


def micro_batches(samples: Samples, rank: int = 0, ranks: int = 1) -> DataLoader[dict[str, Tensor]]:
    """Return the micro-batches of one process in order: every `ranks`-th one, starting at `rank`."""
    starts = range(0, len(samples), MICRO_BATCH)[rank::ranks]
    return DataLoader(samples, batch_sampler=[list(range(start, start + MICRO_BATCH)) for start in starts])


def verses(length: int = 64) -> dict[str, Tensor]:
    """Return English text (N, length) as character codes below 128, which are also the next-token labels."""
    with gzip.open(TEXT, "rt", encoding="utf-8") as file:
        text = "\n".join(line.split("\t")[1] for _, line in zip(range(2000), file, strict=False))
    characters = torch.tensor([min(ord(character), 127) for character in text])
    rows = characters[: len(characters) // length * length].view(-1, length)
    labels = rows.clone()
    labels[:, 0] = -100  # has no predecessor, and `Trainer` divides by the number of labels
    return {"input_ids": rows, "labels": labels}


def digits() -> dict[str, Tensor]:
    """Return the scanned digits of scikit-learn: 64 pixels in [0, 1], and the class."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return {"x": torch.tensor(images / 16, dtype=torch.float32), "labels": torch.tensor(labels)}


# --------------------------------------------------------------------------------------- models


class Classifier(nn.Module):
    """A network of columns that returns its loss, as models of transformers do."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.net(x), labels)}


def gpt2() -> nn.Module:
    """Build a small character-level GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=128, n_positions=64, n_embd=64, n_layer=6, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def gpt2_lora() -> nn.Module:
    """Build the same model with frozen weights and adapters of rank 4."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(gpt2(), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))


def columns() -> nn.Module:
    """Build the network of columns.yaml."""
    return Classifier(revnets.build(FOLDER / "columns.yaml"))


class Workload(NamedTuple):
    model: Callable[[], nn.Module]
    data: Callable[[], dict[str, Tensor]]
    packages: tuple[str, ...]


WORKLOADS = {
    "gpt2": Workload(gpt2, verses, ("transformers",)),
    "gpt2-lora": Workload(gpt2_lora, verses, ("transformers", "peft")),
    "columns": Workload(columns, digits, ("sklearn",)),
}


def installed() -> list[str]:
    """Return the workloads whose packages are installed."""
    return [name for name, workload in WORKLOADS.items() if all(map(find_spec, workload.packages))]


def reversible(model: nn.Module, memory: str) -> nn.Module:
    """Set the memory mode of a model; make it reversible first if it has no columns."""
    columns = [module for module in model.modules() if isinstance(module, ReversibleColumns)]
    if not columns:
        return revnets.make_reversible(model, memory=memory)
    for module in columns:
        module.memory = memory
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0)


# --------------------------------------------------------------------------------------- comparison

Train = Callable[[nn.Module, Samples, str], list[float]]
"""Train a model on samples in a memory mode, and return the mean loss of every update."""


def compared(train: Train, name: str, steps: int) -> dict[str, Any]:
    """Train a workload in `store` and in `exact` from equal weights.

    Returns:
        Losses, and the bytes that each mode saves for the backward of a micro-batch.

    Raises:
        AssertionError: If a weight or a loss differs in one bit.
    """
    workload = WORKLOADS[name]
    samples = Samples(workload.data(), steps)
    weights: dict[str, dict[str, Tensor]] = {}
    losses: dict[str, list[float]] = {}
    kept: dict[str, int] = {}
    for memory in ("store", "exact"):
        torch.manual_seed(0)
        model = workload.model().train()
        first = {key: value.clone() for key, value in model.state_dict().items()}
        losses[memory] = train(model, samples, memory)
        weights[memory] = model.state_dict()
        kept[memory] = kept_bytes(model, **next(iter(micro_batches(samples))))
        assert any(not torch.equal(value, first[key]) for key, value in weights[memory].items()), "nothing was trained"
    for key, expected in weights["store"].items():
        assert torch.equal(weights["exact"][key], expected), f"{name}: {key} differs between exact and store"
    assert losses["exact"] == losses["store"], f"{name}: the losses of exact and store differ"
    return {"losses": losses["exact"], "kept": kept}


def run(engine: str, version: str, train: Train, names: Sequence[str], steps: int) -> dict[str, Any]:
    """Train workloads with an engine, and return the rows of `compare.py`."""
    return {"engine": engine, "version": version, "workloads": {name: compared(train, name, steps) for name in names}}


def main(engine: str, version: str, train: Train, names: Sequence[str]) -> None:
    """Run the command line of an engine's script."""

    def command(
        steps: Annotated[int, typer.Option(min=1, help="Number of updates.")] = 20,
        workloads: Annotated[str, typer.Option(help="Comma-separated names.")] = ",".join(names),
        output: Annotated[Path | None, typer.Option(help="Write results to this JSON file, for compare.py.")] = None,
    ) -> None:
        torch.set_num_threads(1)
        chosen = [name for name in workloads.split(",") if name in names and name in installed()]
        result = run(engine, version, train, chosen, steps)
        if int(os.environ.get("RANK", 0)) == 0:
            for name, found in result["workloads"].items():
                print(f"{engine}, {name}: loss {found['losses'][-1]:.4f}; exact reaches the weights of store")
            if output is not None:
                output.write_text(json.dumps(result), encoding="utf-8")

    typer.run(command)
