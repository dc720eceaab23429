"""Sentences to tokens, tokens to sub-words, many at a time and in several processes.

Other processes import this module, and so it imports nothing that imports torch.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from io import StringIO
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import regex
from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe

from .errors import TranslationError
from .languages import base_language

T = TypeVar("T")
R = TypeVar("R")
MARK = "@@"
"""Ends every sub-word that does not end its word; what fairseq's `--remove-bpe` looks for."""

_CONTROL = regex.compile(r"\p{C}")


@lru_cache(maxsize=8)
def _moses(language: str) -> tuple[MosesPunctNormalizer, MosesTokenizer]:
    return MosesPunctNormalizer(language, perl_parity=True), MosesTokenizer(language)


@lru_cache(maxsize=2)
def _bpe(codes: Path, modified: int) -> BPE:
    with open(codes, encoding="utf-8") as file:
        return BPE(file)


def tokenize(lines: Sequence[str], language: str, normalize: bool = True, aggressive_dashes: bool = False) -> list[str]:
    """Tokens between single spaces, as Moses' tokenizer.perl writes them; &, |, <, >, quotes and brackets are escaped.

    Args:
        normalize: run Moses' normalize-punctuation first, and turn what cannot be printed into spaces.
    """
    normalizer, tokenizer = _moses(base_language(language))
    if normalize:
        lines = [_CONTROL.sub(" ", normalizer.normalize(line)) for line in lines]
    else:
        lines = [line.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'") for line in lines]
    return [str(tokenizer.tokenize(line, aggressive_dashes, return_str=True)) for line in lines]


def detokenize(lines: Iterable[str], language: str) -> list[str]:
    """Sentences as people write them, from tokens between spaces."""
    detokenizer = MosesDetokenizer(base_language(language))
    return [str(detokenizer.detokenize(line.split())) for line in lines]


def learn(
    lines: Iterable[str], merges: int, codes: Path, merged: Callable[[], object] = lambda: None, total: bool = False
) -> int:
    """Learn byte-pair encoding (Sennrich et al., 2016) and write its operations, one a line.

    Args:
        merged: called after every operation.
        total: `merges` is the size of the vocabulary, of which the characters of the text are a part.

    Returns:
        How many operations were learnt: fewer than `merges` when no pair of symbols is left that occurs twice.
    """
    words = Counter[str]()
    for line in lines:
        words.update(line.split())
    learnt = -1  # the first line names the version
    with open(codes, "w", encoding="utf-8") as file, redirect_stderr(StringIO()):  # which has a bar of another style

        class Lines:
            def write(self, text: str) -> None:
                nonlocal learnt
                file.write(text)
                learnt += 1
                merged()

        learn_bpe(
            [f"{word} {count}\n" for word, count in words.items()], Lines(), merges, is_dict=True, total_symbols=total
        )
    return learnt


def segment(lines: Sequence[str], codes: Path) -> list[str]:
    """Sub-words between spaces."""
    bpe = _bpe(codes, codes.stat().st_mtime_ns)
    return [bpe.process_line(line) for line in lines]


def join(line: str) -> str:
    """Words between spaces, from sub-words."""
    return (line + " ").replace(MARK + " ", "").rstrip()


def blocks(items: Iterable[T], size: int = 4096) -> Iterator[list[T]]:
    iterator = iter(items)
    while block := list(islice(iterator, size)):
        yield block


FEW = 8
"""So many items, or fewer, are done before other processes have started."""

MOST = 16
"""Processes by default, at most: beyond that, reading and writing take longer than their work."""


def default_workers() -> int:
    """As many processes as this one may use cores, up to `MOST`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST)


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Processes that are spawned here import the module of their function alone.

    They would import the main module as well, and that of the command `revnets` imports torch, which takes each process
    seconds and several hundred megabytes.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def ordered(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Like `map`, in several processes, with at most a few items under way, so that endless input is welcome.

    Args:
        function: of a module, not of the main one.

    Raises:
        TranslationError: a process was killed.
    """
    iterator = iter(items)
    first = list(islice(iterator, FEW + 1))
    items = chain(first, iterator)
    if workers == 1 or len(first) <= FEW:
        yield from map(function, items)
        return
    pending: deque[Future[R]] = deque()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            for item in items:
                with _without_main_module():
                    pending.append(pool.submit(function, item))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise TranslationError(
                f"one of {workers} processes was killed, perhaps for want of memory. Try fewer (--workers)",
                code="process-lost",
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
