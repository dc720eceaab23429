"""Tokenizers of language models, in the form of transformers: bytes, byte pairs learned from a text, a saved one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from revnets import SpecError
from revnets.config.errors import first_line

END = "<|endoftext|>"
"""The token between two documents; it is the padding as well."""

BYTES = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte of UTF-8 is the token of its own number, and the end of a document is token 256."""
    tokenizer = _wrapped(_byte_pairs())
    tokenizer.is_of_bytes = True  # type: ignore[attr-defined]  # a text need not go through it then
    return tokenizer


def learned_tokenizer(documents: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte pairs that are frequent in a text (Sennrich et al., 2016), on top of all bytes.

    Args:
        size: tokens, the end of a document included; more than 257.
    """
    tokenizer = _byte_pairs()
    tokenizer.pre_tokenizer = cast(Any, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)  # pyright: ignore[reportCallIssue]  # its options have no types
    tokenizer.train_from_iterator(documents, trainer)
    return _wrapped(tokenizer)


def saved_tokenizer(name: str) -> Any:
    """The tokenizer of a folder, or of the hub; it runs no code of theirs.

    Raises:
        revnets.SpecError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        remedy = "Give bytes, {pairs: 1024}, a folder with tokenizer.json, or a name of the hub"
        raise SpecError(str(name), "tokenizer", first_line(error), remedy, code="unreadable-file") from None


def _byte_pairs() -> Tokenizer:
    vocabulary = {symbol: number for number, symbol in enumerate(_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = cast(Any, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.decoder = cast(Any, decoders.ByteLevel())
    return tokenizer


def _symbols() -> list[str]:
    """The printable character of each byte: the byte itself if it is printable, else one from 256 on (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in printable else next(others)) for byte in range(BYTES)]


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([END])
    options = {"eos_token": END, "bos_token": END, "pad_token": END, "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options)
