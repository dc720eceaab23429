"""A text as one row of tokens, cut into sequences of equal length: packed, so that no position is padding.

N tokens of the text, L tokens of a sequence.
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
"""`input_ids` and `labels`, (L,) each; labels are the tokens themselves, or `IGNORED`."""


def encoded(texts: Sequence[str], tokenizer: Any) -> np.ndarray:
    """All documents in a row, (N,), each between two tokens that mark the end of one."""
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
    """Sequences of a text, each of which begins with the last token of the one before: every token is predicted once.

    Asked by number, as in validation, sequences begin at the first token, and the last one is filled up with tokens
    that do not count. Asked by a key (epoch, number), as in training, all are shifted by a random number of tokens
    that is a function of the seed and the epoch, so that the cuts differ from epoch to epoch.

    Args:
        tokens: (N,).
        length: L, at least 2.
        end: token that fills up the last sequence.
        seed: of the shifts; None for a text to validate on.
        key: of the text in the configuration, for messages.

    Raises:
        revnets.SpecError: the text is shorter than a sequence and its shift.
    """

    def __init__(self, tokens: np.ndarray, length: int, end: int, seed: int | None = None, key: str = "train"):
        self.tokens, self.length, self.end, self.seed = tokens, length, end, seed
        step = length - 1
        self.count = -(-(len(tokens) - 1) // step) if seed is None else (len(tokens) - 1) // step - 1
        if self.count < 1:
            problem = f"a text of {len(tokens):,} tokens is shorter than two sequences of {length}"
            raise error(key, problem, "Give more text, or a smaller length", "too-few-samples")

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
    """The same sequence without a label, which no evaluation counts."""
    return {**sample, "labels": torch.full_like(sample["labels"], IGNORED)}
