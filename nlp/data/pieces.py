"""Pieces of raw text, by a model of sentencepiece (Kudo and Richardson, 2018) that is learned for both languages.

A piece is a part of a sentence; a space is the first character of a piece. No tokenizer is needed, so that languages
without spaces between words are split as others are, and the text comes back character by character.

Other processes import this module, and so it imports nothing that imports torch.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from unicodedata import category

from .errors import TranslationError

MODEL = "sentencepiece.model"
DICTIONARY = "dict.txt"

DEFAULT_VOCAB = 8000
"""Pieces at most, where no number is given: fewer if the text has not as many."""

SENTENCES = 2_000_000
"""At most this many sentences, drawn at random, are used for learning, to bound memory."""

LONGEST = 4192
"""Bytes of a sentence used for learning, sentencepiece's default. Longer ones are split like others."""

_PROGRAM = """
import json, sys, sentencepiece
sentencepiece.set_random_generator_seed(1)
sentencepiece.SentencePieceTrainer.train(**json.loads(sys.argv[1]))
"""
_THREADS = 16
"""A constant, since sums of floating-point numbers, and with them the pieces, depend on the number of threads."""

_SPACES = [char for char in map(chr, range(0x3001)) if char.isspace() and char != " "]
_SPACES += ["\u200b", "\ufeff", "\u2581"]  # of zero width, and the character by which pieces show a space
_CONTROL = [char for char in map(chr, range(1, 0xA0)) if category(char) == "Cc" and char not in _SPACES]
"""What the model takes for a space, and what it drops. It changes nothing else: NFKC, sentencepiece's default, would
turn the punctuation of Chinese and Japanese into that of Latin scripts."""

_RESERVED = {"<s>": "<unk>", "<pad>": "<unk>", "</s>": "<unk>"}
"""Symbols of fairseq's dictionary. In text they are words, and none that the model has learned."""


def learn_pieces(
    texts: Sequence[str], folder: Path, vocab: int | None, model_type: str, character_coverage: float
) -> int:
    """Learn a model, and write it and fairseq's dictionary of its pieces into a folder.

    Equal texts give equal models on any machine and in any folder.

    Args:
        texts: paths relative to the folder; the model records them.
        vocab: exactly so many pieces, those for unknown text and the ends of sentences included. None means
            `DEFAULT_VOCAB` or as many as the text has.
        model_type: "unigram" (Kudo, 2018) or "bpe" (Sennrich et al., 2016).
        character_coverage: the share of the characters of the text that are pieces; rarer ones become `<unk>`.

    Returns:
        The number of pieces.

    Raises:
        TranslationError: the text has too few or too many different characters or words, or the process failed.
    """
    rules = [f"{ord(char):X}\t20" for char in _SPACES] + [f"{ord(char):X}\t" for char in _CONTROL]
    normalization = folder / "normalization.tsv"
    normalization.write_text("\n".join(sorted(rules)) + "\n", encoding="utf-8")
    options: dict[str, Any] = {
        "input": list(texts),
        "model_prefix": Path(MODEL).stem,
        "vocab_size": vocab or DEFAULT_VOCAB,
        "hard_vocab_limit": vocab is not None,
        "model_type": model_type,
        "character_coverage": character_coverage,
        "normalization_rule_tsv": normalization.name,
        "input_sentence_size": SENTENCES,
        "max_sentence_length": LONGEST,
        "num_threads": _THREADS,
        "minloglevel": 2,
    }
    # Another process, which Ctrl-C ends at once, and whose folder keeps the paths in the model short.
    words = [sys.executable, "-c", _PROGRAM, json.dumps(options)]
    done = subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise _explained(done.returncode, (done.stderr.strip().splitlines() or [""])[-1])
    for rest in (normalization, folder / Path(MODEL).with_suffix(".vocab")):
        rest.unlink()
    pieces = list(_learned(folder / MODEL))
    symbols = len(_RESERVED) + 1
    # fairseq fills the dictionaries that it makes itself up to a multiple of 8 in the same way.
    pieces += [f"madeupword{number:04}" for number in range(-(len(pieces) + symbols) % 8)]
    (folder / DICTIONARY).write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")
    return _processor(folder / MODEL, (folder / MODEL).stat().st_mtime_ns).vocab_size()


def split_pieces(lines: Sequence[str], model: Path) -> list[str]:
    """Pieces between spaces, as `fairseq-interactive --bpe sentencepiece` makes them.

    Raises:
        TranslationError: the file holds no model.
    """
    processor = _processor(model, model.stat().st_mtime_ns)
    found: list[list[str]] = processor.encode(list(lines), out_type=str, num_threads=1)
    return [" ".join(_RESERVED.get(piece, piece) for piece in line) for line in found]


@lru_cache(maxsize=2)
def _processor(model: Path, modified: int) -> Any:
    """A `SentencePieceProcessor`, whose methods have no types."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(model))
    except (RuntimeError, OSError):
        raise TranslationError(
            f"{model}: no model of sentencepiece. Delete {model.parent}, and run the command again", code="damaged-file"
        ) from None


def _learned(model: Path) -> Iterator[str]:
    """The pieces of a model without those for unknown text and the ends of sentences."""
    processor = _processor(model, model.stat().st_mtime_ns)
    for number in range(processor.vocab_size()):
        if not processor.is_control(number) and not processor.is_unknown(number):
            yield processor.id_to_piece(number)


def _explained(status: int, message: str) -> TranslationError:
    """The error for what sentencepiece wrote last."""
    if status < 0:
        return TranslationError(
            f"sentencepiece was killed by signal {-status}, perhaps for want of memory. Run the command again with "
            "more memory or less text",
            code="process-lost",
        )
    if match := re.search(r"size too high \((\d+)\).* value <= (\d+)", message):
        return TranslationError(
            f"the training text has {int(match[2]):,} pieces at most, {int(match[1]):,} are asked for. Give --vocab "
            f"{match[2]} or less, or more text",
            code="out-of-range",
        )
    if match := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message):
        return TranslationError(
            f"the training text has too many characters for {int(match[1]):,} pieces. Give --vocab {match[2]} or more, "
            "or a lower --character-coverage",
            code="out-of-range",
        )
    if "all_chars_count" in message or "!sentences_.empty()" in message:
        return TranslationError(
            f"the training text has no sentence of at most {LONGEST:,} bytes. Give one sentence a line",
            code="empty-data",
        )
    return TranslationError(f"sentencepiece failed: {message[:500]}", code="process-failed")
