"""Measure the bytes per element and block that a reversible network saves for backward, for each blend.

    pip install 'revnets[vision,hf]'
    python examples/pretrained/blend_bytes.py                                  # under a CPU minute, one thread

The same network is built with two numbers of blocks and converted in the memory mode `exact`. The difference in saved
bytes is divided by the number of additional blocks and the elements of a state, so embeddings and heads cancel out. A
whole state would take 4 bytes per element in float32 and 2 in bfloat16. Weights are random.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
import typer
from _measures import new_console, new_table, run_as_script
from torch import Tensor, nn

import revnets
from revnets.memory.tracker import MemoryTracker

BLENDS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
WIDTH = 96


class Kind(NamedTuple):
    """A network of variable depth, and its input."""

    create: Callable[[int], nn.Module]
    batch: Tensor
    elements: int  # of a state


def new_vit(depth: int) -> nn.Module:
    """Build a pre-norm ViT of timm."""
    import timm

    options = {"img_size": 64, "patch_size": 16, "embed_dim": WIDTH, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", depth=depth, **options)


def new_gpt2(depth: int) -> nn.Module:
    """Build a pre-norm GPT-2 of transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_layer=depth, n_head=3, vocab_size=97, use_cache=False))


def new_bert(depth: int) -> nn.Module:
    """Build a post-norm BERT of transformers."""
    from transformers import BertConfig, BertModel

    heads = {"num_attention_heads": 3, "intermediate_size": 4 * WIDTH}
    return BertModel(BertConfig(hidden_size=WIDTH, num_hidden_layers=depth, vocab_size=97, **heads))


def kinds() -> dict[str, Kind]:
    """Return the measured networks, with 23 samples each."""
    tokens = torch.randint(0, 97, (23, 17))
    return {
        "ViT": Kind(new_vit, torch.randn(23, 3, 64, 64), 23 * 17 * WIDTH),
        "GPT-2": Kind(new_gpt2, tokens, 23 * 17 * WIDTH),
        "BERT": Kind(new_bert, tokens, 23 * 17 * WIDTH),
    }


def kept(model: nn.Module, batch: Tensor) -> int:
    """Count the bytes alive after a forward in training mode."""
    with MemoryTracker() as tracker:
        output: Any = model(batch)
        live = tracker.live
    del output
    return live


def bytes_per_element(kind: Kind, blend: float, depths: tuple[int, int] = (4, 8), bfloat16: bool = False) -> float:
    """Compute the bytes per element of one block from two depths."""
    found = []
    for depth in depths:
        torch.manual_seed(0)
        model = revnets.make_reversible(kind.create(depth), blend).train()
        batch = kind.batch
        if bfloat16:
            model = model.bfloat16()
            batch = batch.bfloat16() if batch.is_floating_point() else batch
        found.append(kept(model, batch))
    return (found[1] - found[0]) / (depths[1] - depths[0]) / kind.elements


def main(
    blends: Annotated[str, typer.Option(help="Comma-separated blends.")] = ",".join(f"{b:g}" for b in BLENDS),
) -> None:
    """Measure bytes per element and block for each blend."""
    console = new_console()
    found = kinds()
    table = new_table(
        "bytes per element and block", "b", *(f"{name}, {kind}" for name in found for kind in ("fp32", "bf16"))
    )
    for blend in [float(word) for word in blends.split(",")]:
        values = [bytes_per_element(kind, blend, bfloat16=half) for kind in found.values() for half in (False, True)]
        table.add_row(f"{blend:g}", *(f"{value:.2f}" for value in values))
    console.print(table)


if __name__ == "__main__":
    run_as_script(main)
