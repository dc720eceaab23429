"""Packed text: documents joined to one array of tokens and cut into sequences of equal length without padding.

Shapes: N tokens of the text, L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .loss import IGNORED
from .text_documents import error

Sample = dict[str, Tensor]
"""`input_ids` and `labels`, (L,) each; labels are tokens, or `IGNORED`."""


def encoded(texts: Sequence[str], tokenizer: Any) -> np.ndarray:
    """Encode documents and join them with the end token, which also comes first and last.

    Args:
        texts: Documents.
        tokenizer: Tokenizer of transformers.

    Returns:
        (N,) tokens, uint16 or int32.
    """
    end = tokenizer.eos_token_id
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    rows = [np.array([end], kind)]
    for text in texts:
        rows += [_tokens(text, tokenizer).astype(kind), rows[0]]
    return np.concatenate(rows)


def _tokens(text: str, tokenizer: Any) -> np.ndarray:
    if getattr(tokenizer, "is_of_bytes", False):
        return np.frombuffer(text.encode("utf-8"), np.uint8)
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)


class PackedText(Dataset[Sample]):
    """Sequences of a text. Each starts with the last token of the previous one, so every token is predicted once.

    In validation, the index is a number: sequences start at the first token, and the last sequence is padded with
    tokens without a loss. In training, the index is a key (epoch, number): all sequences of an epoch are shifted by a
    random number of tokens that depends on the seed and the epoch, so the cuts differ between epochs.

    Args:
        tokens: (N,) tokens of the text.
        length: Tokens of a sequence L, at least 2.
        end: Token that pads the last sequence.
        seed: Seed of the shifts; None for validation.
        key: Key of the text in the configuration, for error messages.

    Raises:
        revnets.SpecError: If the text is too short.
    """

    def __init__(self, tokens: np.ndarray, length: int, end: int, seed: int | None = None, key: str = "train"):
        self.tokens, self.length, self.end, self.seed = tokens, length, end, seed
        step = length - 1
        self.count = -(-(len(tokens) - 1) // step) if seed is None else (len(tokens) - 1) // step - 1
        if self.count < 1:
            problem = f"the text has {len(tokens):,} tokens, fewer than two sequences of {length}"
            raise error(key, problem, "Use more text, or a smaller length", "too-few-samples")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Any) -> Sample:
        shift, index = 0, key
        if self.seed is not None:
            epoch, index = key
            shift = int(np.random.default_rng((self.seed, epoch)).integers(self.length - 1))
        start = shift + index * (self.length - 1)
        tokens = torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))
        missing = self.length - len(tokens)
        return {
            "input_ids": torch.nn.functional.pad(tokens, (0, missing), value=self.end),
            "labels": torch.nn.functional.pad(tokens, (0, missing), value=IGNORED),
        }


def uncounted(sample: Sample) -> Sample:
    """Return the sequence without labels, so that no evaluation counts it."""
    return {**sample, "labels": torch.full_like(sample["labels"], IGNORED)}
