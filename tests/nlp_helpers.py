"""A small corpus that can be learnt, fairseq's commands on it, and models without a command."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY
from torch import Tensor

from nlp.model import RevColTransformerModel

WORDS = 30


def write_corpus(folder: Path, pairs: int, seed: int = 0) -> None:
    """Word-for-word translations of random sentences, split into train, valid and test, some words in two parts."""
    rng = random.Random(seed)
    table = dict(zip(range(WORDS), rng.sample(range(WORDS), WORDS), strict=True))
    for split, count in (("train", pairs), ("valid", pairs // 8), ("test", pairs // 8)):
        sentences = [[rng.randrange(WORDS) for _ in range(rng.randint(2, 7))] for _ in range(count)]
        for language, words in (("en", sentences), ("de", [[table[word] for word in line] for line in sentences])):
            lines = [" ".join(spell(word, language) for word in line) for line in words]
            (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n")


def spell(word: int, language: str) -> str:
    """Every third word consists of two sub-words, as subword-nmt writes them."""
    return f"{language}{word}@@ s" if word % 3 == 0 else f"{language}{word}"


def dictionary(words: int) -> Dictionary:
    found = Dictionary()
    for index in range(words - len(found)):
        found.add_symbol(f"w{index}")
    return found


def options(arch: str = "revcol_transformer_tiny", **given: Any) -> argparse.Namespace:
    """The options of a model as the command line would make them."""
    args = argparse.Namespace(arch=arch, share_all_embeddings=True, **given)
    ARCH_CONFIG_REGISTRY[arch](args)
    return args


def build(
    arch: str = "revcol_transformer_tiny", words: int = 53, seed: int = 0, **given: Any
) -> RevColTransformerModel:
    torch.manual_seed(seed)
    symbols = dictionary(words)
    task = SimpleNamespace(source_dictionary=symbols, target_dictionary=symbols)
    return RevColTransformerModel.build_model(options(arch, **given), task)


def sample(lengths: tuple[int, ...] = (11, 7, 3), words: int = 53, seed: int = 1) -> dict[str, Tensor]:
    """The `net_input` of a batch: sentences padded at the left, translations at the right, as fairseq does it."""
    pad = dictionary(words).pad()
    generator = torch.Generator().manual_seed(seed)
    source = torch.full((len(lengths), max(lengths)), pad)
    target = source.clone()
    for row, length in enumerate(lengths):
        source[row, -length:] = torch.randint(4, words, (length,), generator=generator)
        target[row, :length] = torch.randint(4, words, (length,), generator=generator)
    return {"src_tokens": source, "src_lengths": torch.tensor(lengths), "prev_output_tokens": target}
