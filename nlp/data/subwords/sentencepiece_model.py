"""Subwords of raw text by a joint sentencepiece model of both languages (Kudo and Richardson, 2018).

A piece is a substring of a sentence, and a leading space is part of it. No tokenizer is needed, so languages without
spaces between words need no special treatment, and pieces join to the original text character by character.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from unicodedata import category

from ..errors import TranslationError

MODEL = "sentencepiece.model"
DICTIONARY = "dict.txt"

DEFAULT_VOCAB = 8000
"""Default size of the vocabulary; a small text may have fewer pieces."""

MAX_VOCAB = 1_000_000
"""Largest vocabulary: the number of candidates that sentencepiece starts a unigram model from."""

SENTENCES = 2_000_000
"""Maximum number of training sentences, sampled at random to bound memory."""

LONGEST = 4192
"""Bytes of the longest training sentence, sentencepiece's default. Longer sentences are split like others."""

_PROGRAM = """
import json, sys, sentencepiece
sentencepiece.set_random_generator_seed(1)
sentencepiece.SentencePieceTrainer.train(**json.loads(sys.argv[1]))
"""
_THREADS = 16
"""A constant, because floating-point sums, and so the pieces, depend on the number of threads."""

_SPACES = [char for char in map(chr, range(0x3001)) if char.isspace() and char != " "]
_SPACES += ["\u200b", "\ufeff", "\u2581"]  # zero-width characters, and the symbol that represents a space in pieces
_CONTROL = [char for char in map(chr, range(1, 0xA0)) if category(char) == "Cc" and char not in _SPACES]
"""Characters that become spaces, and characters that are dropped. No other character changes: sentencepiece's default
normalization, NFKC, would convert Chinese and Japanese punctuation to Latin punctuation."""

_RESERVED = {"<s>": "<unk>", "<pad>": "<unk>", "</s>": "<unk>"}
"""Symbols of fairseq's dictionary. Where a text contains them, they are unknown words."""

_STATES = (
    (re.compile(r"EM sub_iter=\d+ size=(\d+)"), "{:,} candidates left"),
    (re.compile(r"merges=(\d+)"), "{:,} merges"),
)
"""Log lines of sentencepiece that report progress, and how to print them."""


def learn_pieces(
    texts: Sequence[str],
    folder: Path,
    vocab: int | None,
    model_type: str,
    character_coverage: float,
    report: Callable[[str], object] = lambda _: None,
) -> int:
    """Train a model, and write it and fairseq's dictionary of its pieces to a directory.

    Equal texts give equal models on any machine and in any directory.

    Args:
        texts: Paths of the training texts relative to the directory; the model records them.
        folder: Directory of the model.
        vocab: Exact number of pieces, including those for unknown text and the ends of a sentence. If None,
            `DEFAULT_VOCAB`, or fewer for a small text.
        model_type: `unigram` (Kudo, 2018) or `bpe` (Sennrich et al., 2016).
        character_coverage: Share of the characters of the text that get a piece; rarer characters become `<unk>`.
        report: Called with a few words on the progress, such as "8,800 candidates left".

    Returns:
        The number of pieces.

    Raises:
        TranslationError: If the text supports only fewer pieces, if it needs more pieces for its characters, if it is
            empty, or if the training process failed.
    """
    rules = [f"{ord(char):X}\t20" for char in _SPACES] + [f"{ord(char):X}\t" for char in _CONTROL]
    normalization = folder / "normalization.tsv"
    normalization.write_text("\n".join(sorted(rules)) + "\n", encoding="utf-8")
    size = DEFAULT_VOCAB if vocab is None else vocab
    options: dict[str, Any] = {
        "input": list(texts),
        "model_prefix": Path(MODEL).stem,
        "vocab_size": max(size, len(_RESERVED) + 1),  # with fewer, sentencepiece does not report how many it needs
        "hard_vocab_limit": vocab is not None,
        "model_type": model_type,
        "character_coverage": character_coverage,
        "normalization_rule_tsv": normalization.name,
        "input_sentence_size": SENTENCES,
        "max_sentence_length": LONGEST,
        "num_threads": _THREADS,
        "minloglevel": 0,
    }
    status, message = _train(options, folder, report)
    if status:
        raise _explained(status, message, size)
    for rest in (normalization, folder / Path(MODEL).with_suffix(".vocab")):
        rest.unlink()
    pieces = list(_learned(folder / MODEL))
    symbols = len(_RESERVED) + 1
    # fairseq pads the dictionaries that it builds to a multiple of 8 in the same way.
    pieces += [f"madeupword{number:04}" for number in range(-(len(pieces) + symbols) % 8)]
    (folder / DICTIONARY).write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")
    return _processor(folder / MODEL, (folder / MODEL).stat().st_mtime_ns).vocab_size()


def _train(options: dict[str, Any], folder: Path, report: Callable[[str], object]) -> tuple[int, str]:
    """Run sentencepiece in a process that Ctrl-C ends at once, and return its exit status and its last line."""
    command = [sys.executable, "-c", _PROGRAM, json.dumps(options)]
    last = ""
    with subprocess.Popen(
        command,
        cwd=folder,  # keeps the paths in the model short
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                last = line.strip() or last
                for pattern, text in _STATES:
                    if match := pattern.search(line):
                        report(text.format(int(match[1])))
        except BaseException:
            process.kill()
            raise
    return process.returncode, last


def split_pieces(lines: Sequence[str], model: Path) -> list[str]:
    """Split sentences into pieces separated by spaces, as `fairseq-interactive --bpe sentencepiece` does.

    Args:
        lines: Sentences.
        model: File that `learn_pieces` wrote.

    Raises:
        TranslationError: If the file is not a sentencepiece model.
    """
    processor = _processor(model, model.stat().st_mtime_ns)
    found: list[list[str]] = processor.encode(list(lines), out_type=str, num_threads=1)
    return [" ".join(_RESERVED.get(piece, piece) for piece in line) for line in found]


@lru_cache(maxsize=2)
def _processor(model: Path, modified: int) -> Any:
    """Load a `SentencePieceProcessor`, whose methods are not typed."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(model))
    except (RuntimeError, OSError):
        raise TranslationError(
            f"{model}: not a sentencepiece model. Delete {model.parent} and run the command again", code="damaged-file"
        ) from None


def _learned(model: Path) -> Iterator[str]:
    """Yield the pieces of a model, except those for unknown text and the ends of a sentence."""
    processor = _processor(model, model.stat().st_mtime_ns)
    for number in range(processor.vocab_size()):
        if not processor.is_control(number) and not processor.is_unknown(number):
            yield processor.id_to_piece(number)


def _explained(status: int, message: str, vocab: int) -> TranslationError:
    """Convert the last line of sentencepiece to an error.

    Args:
        status: Exit status of its process.
        message: Its last line.
        vocab: Size of the vocabulary that was requested.
    """
    if status < 0:
        return TranslationError(
            f"sentencepiece was killed by signal {-status}, possibly out of memory. Run the command again with more "
            "memory or less text",
            code="process-lost",
        )
    if match := re.search(r"size too high \(\d+\).* value <= (\d+)", message):
        return TranslationError(
            f"--vocab {vocab} is too large: the training text has at most {int(match[1]):,} pieces. Use --vocab "
            f"{match[1]} or less, or more text",
            code="out-of-range",
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return TranslationError(
            f"--vocab {vocab} is too small: the characters of the training text need {int(match[1]):,} pieces. Use "
            f"--vocab {match[1]} or more, or a lower --character-coverage",
            code="out-of-range",
        )
    if "all_chars_count" in message or "!sentences_.empty()" in message:
        return TranslationError(
            f"the training text has no sentence of at most {LONGEST:,} bytes. Use one sentence per line",
            code="empty-data",
        )
    return TranslationError(f"sentencepiece failed: {message[:500]}", code="process-failed")
