"""A small corpus that can be learned, commands of fairseq on it, and models without a command."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY
from torch import Tensor

from nlp.models.revcol_transformer import RevColTransformerModel
from tests.support.paths import ROOT

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
    """Split every third word into two subwords, as subword-nmt writes them."""
    return f"{language}{word}@@ s" if word % 3 == 0 else f"{language}{word}"


def dictionary(words: int) -> Dictionary:
    found = Dictionary()
    for index in range(words - len(found)):
        found.add_symbol(f"w{index}")
    return found


def options(arch: str = "revcol_transformer_tiny", **given: Any) -> argparse.Namespace:
    """Return the options of a model as the command line parses them."""
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
    """Return the `net_input` of a batch: sentences padded on the left, translations on the right, as in fairseq."""
    pad = dictionary(words).pad()
    generator = torch.Generator().manual_seed(seed)
    source = torch.full((len(lengths), max(lengths)), pad)
    target = source.clone()
    for row, length in enumerate(lengths):
        source[row, -length:] = torch.randint(4, words, (length,), generator=generator)
        target[row, :length] = torch.randint(4, words, (length,), generator=generator)
    return {"src_tokens": source, "src_lengths": torch.tensor(lengths), "prev_output_tokens": target}


# -------------------------------------------------------------------------------------------------- commands of fairseq

USER_DIR = ROOT / "nlp"
TINY = ("--arch", "revcol_transformer_tiny", "--revcol-columns", "2", "--share-all-embeddings")
QUICK = (
    *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr", "0.005", "--lr-scheduler", "inverse_sqrt"),
    *("--warmup-updates", "40", "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
    *("--cpu", "--num-workers", "0", "--no-epoch-checkpoints", "--log-interval", "1", "--log-format", "json"),
)


def fairseq(name: str, *arguments: object) -> list[dict[str, str]]:
    """Run the main function of `fairseq-<name>` in this process.

    Returns its JSON log.
    """
    command = importlib.import_module(f"fairseq_cli.{name}")
    logged: list[dict[str, str]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (text := record.getMessage()).startswith("{"):
                logged.append(json.loads(text))

    logger, handler = logging.getLogger("fairseq.logging.progress_bar"), Handler(logging.INFO)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with mock.patch.object(sys, "argv", [f"fairseq-{name}", *map(str, arguments)]):
            command.cli_main()
    finally:
        logger.removeHandler(handler)
    return logged


def preprocess(folder: Path, pairs: int) -> Path:
    """Write the corpus and convert it to a fairseq data set with a joined dictionary."""
    write_corpus(folder, pairs)
    texts = [part for split in ("train", "valid", "test") for part in (f"--{split}pref", folder / split)]
    target = folder / "data-bin"
    fairseq(
        "preprocess", "--source-lang", "en", "--target-lang", "de", *texts, "--destdir", target, "--joined-dictionary"
    )
    return target


def train(data: Path, save_dir: Path, *arguments: object) -> list[dict[str, str]]:
    """Train with `fairseq-train`; return its JSON log."""
    return fairseq("train", data, "--user-dir", USER_DIR, "--save-dir", save_dir, *TINY, *QUICK, *arguments)


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)
