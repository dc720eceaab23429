"""Tokenizers for transformers: bytes, byte pairs learned from a text, or a saved tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from revnets import SpecError
from revnets.config.errors import first_line

END = "<|endoftext|>"
"""Token between two documents, and padding token."""

BYTES = 256
"""Number of different bytes."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Create a tokenizer that maps every UTF-8 byte to its value, and the end of a document to 256."""
    tokenizer = _wrapped(_byte_pairs())
    tokenizer.is_of_bytes = True  # type: ignore[attr-defined]  # a fast path for whole texts
    return tokenizer


def learned_tokenizer(documents: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level tokenizer of frequent byte pairs (Sennrich et al., 2016).

    Args:
        documents: Training text.
        size: Size of the vocabulary, more than 257; it includes all bytes and the end of a document.
    """
    tokenizer = _byte_pairs()
    tokenizer.pre_tokenizer = cast(Any, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)  # pyright: ignore[reportCallIssue]  # its options have no types
    tokenizer.train_from_iterator(documents, trainer)
    return _wrapped(tokenizer)


def saved_tokenizer(name: str) -> Any:
    """Load a tokenizer from a directory or the Hub, without running its code.

    Args:
        name: Directory, or name on the Hub.

    Raises:
        revnets.SpecError: If there is no tokenizer, or if it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises many types
        remedy = "Use bytes, {pairs: 1024}, a directory with tokenizer.json, or a name on the Hub"
        raise SpecError(str(name), "tokenizer", first_line(error), remedy, code="unreadable-file") from None


def _byte_pairs() -> Tokenizer:
    vocabulary = {symbol: number for number, symbol in enumerate(_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = cast(Any, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.decoder = cast(Any, decoders.ByteLevel())
    return tokenizer


def _symbols() -> list[str]:
    """Return a printable character for each byte: the byte itself, or one from 256 on if it is unprintable (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in printable else next(others)) for byte in range(BYTES)]


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([END])
    options = {"eos_token": END, "bos_token": END, "pad_token": END, "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options)
