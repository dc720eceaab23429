"""From raw parallel text to a fairseq data set: choose, tokenise, learn and apply sub-words, clean, binarise."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from revnets.utils.atomic_files import remove_leftovers

from .corpus import Pair, TranslationError, named
from .download import extract_archive, fetch
from .recipe import Clean, Recipe
from .resumable_steps import Facts, Stages
from .splits import DROPPED, SPLITS, choose
from .tokenization import blocks, learn, ordered, segment, tokenize


class SentencePair(NamedTuple):
    """A pair on its way, and as it was read."""

    split: str
    pair: Pair
    raw: Pair


def prepare(
    recipe: Recipe,
    output: Path,
    base: Path = Path(),
    downloads: Path = Path("downloads"),
    workers: int = 1,
    overwrite: bool = False,
    console: Console | None = None,
) -> Facts:
    """Make the folder `output`: fairseq's binarised splits and dictionaries, the codes, and the raw test set.

    Half-done work lies in `<output>.work` and is used when the same call is made again; `output` itself appears when
    everything is done.

    Args:
        base: where the recipe's own files are looked for.
        downloads: where archives are kept.
        overwrite: replace what is in `output` already.

    Returns:
        Counts of pairs and types, and why pairs were dropped.

    Raises:
        TranslationError: one line on what is wrong with the data.
    """
    console = console or Console()
    stages = Stages(_inputs(recipe, base))
    if (facts := stages.facts(output)) is not None:
        console.print(f"{output} is there already, made by the same recipe from the same files", soft_wrap=True)
        return facts
    if output.exists() and not overwrite:
        raise TranslationError(
            f"{output} is there, made in another way. Give another --output, or --overwrite to replace it",
            code="settings-differ",
        )
    if find_spec("fairseq_cli") is None:  # it comes last, and the other steps can take hours
        raise TranslationError(
            "fairseq is not installed, which binarises the text. Try: pip install 'revnets[nlp]'",
            code="missing-dependency",
        )
    work = output.with_name(output.name + ".work")
    remove_leftovers(work)
    remove_leftovers(output.parent, output.name)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console) as progress:
            archives = [fetch(item, downloads, progress) for item in recipe.downloads]
            folders = [extract_archive(archive, work, progress) for archive in archives]
            steps = _Steps(recipe, (*folders, base), work, workers, progress)
            facts = stages.run(work / "chosen", steps.choose)
            stages.run(work / "tokens", steps.tokenize)
            if recipe.merges is not None:
                facts |= stages.run(work / "codes", steps.learn)
            found = facts | stages.run(work / "units", steps.split)
            facts = stages.run(output, lambda folder: found | steps.binarize(folder))
    finally:
        with suppress(OSError):  # it is not there, or not empty: it is of use for the next call
            work.rmdir()
    shutil.rmtree(work)
    return facts


@dataclass
class _Steps:
    """Each fills the folder that it is given, from the folders that were filled before it."""

    recipe: Recipe
    folders: tuple[Path, ...]
    work: Path
    workers: int
    progress: Progress

    def choose(self, folder: Path) -> Facts:
        """Read everything once, so that bad input is told before any work is done, and choose the splits."""
        task = self.progress.add_task("read", total=None)
        given = sum(1 for name in SPLITS[1:] for _ in self._read(name, task))
        chosen, facts = choose(self._read("train", task), self.recipe)
        self.progress.update(task, total=len(chosen) + given)
        np.save(folder / "chosen.npy", chosen)
        return facts

    def tokenize(self, folder: Path) -> Facts:
        chosen = np.load(self.work / "chosen" / "chosen.npy").tolist()
        task = self.progress.add_task("tokenise", total=len(chosen))
        taken = zip(chosen, self._read("train", task), strict=True)
        train = (SentencePair(SPLITS[index], pair, pair) for index, pair in taken if index != DROPPED)
        given = (SentencePair(name, pair, pair) for name in SPLITS[1:] for pair in self._read(name))
        work = partial(_tokenize, codes=self.recipe.codes, dashes=self.recipe.aggressive_dashes)
        with _Writer(folder, self.recipe.codes) as writer:
            for rows, normalize in ((train, True), (given, self.recipe.normalize == "all")):
                function = partial(work, normalize=normalize) if self.recipe.tokenize else _same
                for row in chain.from_iterable(ordered(function, blocks(rows), self.workers)):
                    writer.write(row)
        return {}

    def learn(self, folder: Path) -> Facts:
        assert self.recipe.merges is not None
        task = self.progress.add_task("learn sub-words", total=self.recipe.merges)
        files = [self.work / "tokens" / f"train.{code}" for code in self.recipe.codes]
        lines = chain.from_iterable(map(_lines, files))
        learnt = learn(lines, self.recipe.merges, folder / "codes", lambda: self.progress.advance(task))
        self.progress.update(task, total=learnt, completed=learnt)
        return {"merges": learnt}

    def split(self, folder: Path) -> Facts:
        """Sub-words; pairs that came from the training text are cleaned by their number."""
        task = self.progress.add_task("split into sub-words", total=None)
        work = _same if self.recipe.merges is None else partial(_split, codes=self.work / "codes" / "codes")
        kept, dropped = Counter[str](), Counter[str]()
        own = [name for name in SPLITS if name == "train" or not self.recipe.corpora(name, self.folders)]
        with _Writer(folder, self.recipe.codes) as writer:
            rows = chain.from_iterable(_rows(self.work / "tokens", name, self.recipe.codes) for name in SPLITS)
            for block in ordered(work, blocks(rows), self.workers):
                for row in block:
                    reason = _reason(self.recipe.clean, row.pair) if row.split in own else None
                    if reason:
                        dropped[reason] += 1
                    else:
                        kept[row.split] += 1
                        writer.write(row)
                self.progress.advance(task, len(block))
        if missing := [name for name in SPLITS if not kept[name]]:
            why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            raise TranslationError(
                f"no pair is left for {missing[0]}: {why}. Allow longer sentences, or other ratios", code="empty-data"
            )
        self.progress.update(task, total=kept.total() + dropped.total())
        return dict(dropped | kept)

    def binarize(self, folder: Path) -> Facts:
        """fairseq-preprocess, and beside its files whatever else translating and scoring need."""
        task = self.progress.add_task("binarise", total=None)
        units, (source, target) = self.work / "units", self.recipe.codes
        command = [sys.executable, "-m", "fairseq_cli.preprocess", "--joined-dictionary", "--destdir", str(folder)]
        command += ["--source-lang", source, "--target-lang", target, "--workers", str(self.workers)]
        command += [word for name in SPLITS for word in (f"--{name}pref", str(units / name))]
        if self.recipe.words is not None:
            command += ["--nwordssrc", str(self.recipe.words), "--nwordstgt", str(self.recipe.words)]
        log = self.work / "preprocess.log"
        with open(log, "w", encoding="utf-8") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise TranslationError(
                f"fairseq-preprocess failed: {''.join(last)}. All that it said is in {log}", code="process-failed"
            )
        if self.recipe.merges is not None:
            shutil.copy(self.work / "codes" / "codes", folder)
        if self.recipe.tokenize:
            for code in self.recipe.codes:
                shutil.copy(units / f"raw.test.{code}", folder / f"test.raw.{code}")
        self.progress.update(task, total=1, completed=1)
        return {"types": sum(1 for _ in _lines(folder / f"dict.{source}.txt"))}

    def _read(self, name: str, task: Any = None) -> Iterator[Pair]:
        for corpus in self.recipe.corpora(name, self.folders):
            for block in blocks(corpus.pairs()):
                yield from block
                if task is not None:
                    self.progress.advance(task, len(block))


class _Writer(ExitStack):
    """Files of rows: opened when the first row of a split comes."""

    def __init__(self, folder: Path, codes: Pair):
        super().__init__()
        self.folder, self.codes = folder, codes
        self.files: dict[str, list[IO[str]]] = {}

    def write(self, row: SentencePair) -> None:
        if row.split not in self.files:
            paths = _paths(self.folder, row.split, self.codes)
            opened = [open(path, "w", encoding="utf-8") for path in paths]  # noqa: SIM115, the stack closes them
            self.files[row.split] = [self.enter_context(file) for file in opened]
        for file, line in zip(self.files[row.split], (*row.pair, *row.raw), strict=False):
            file.write(line + "\n")


def _paths(folder: Path, name: str, codes: Pair) -> list[Path]:
    """The two files of a split; two more keep the test as it was read."""
    kinds = ("", "raw.") if name == "test" else ("",)
    return [folder / f"{kind}{name}.{code}" for kind in kinds for code in codes]


def _rows(folder: Path, name: str, codes: Pair) -> Iterator[SentencePair]:
    for lines in zip(*map(_lines, _paths(folder, name, codes)), strict=True):
        yield SentencePair(name, lines[:2], lines[-2:])


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line.rstrip("\n")


def _same(rows: list[SentencePair]) -> list[SentencePair]:
    return rows


def _tokenize(rows: list[SentencePair], codes: Pair, normalize: bool, dashes: bool) -> list[SentencePair]:
    texts = [tokenize([row.pair[side] for row in rows], code, normalize, dashes) for side, code in enumerate(codes)]
    return [row._replace(pair=pair) for row, pair in zip(rows, zip(*texts, strict=True), strict=True)]


def _split(rows: list[SentencePair], codes: Path) -> list[SentencePair]:
    texts = [segment([row.pair[side] for row in rows], codes) for side in range(2)]
    return [row._replace(pair=pair) for row, pair in zip(rows, zip(*texts, strict=True), strict=True)]


def _reason(clean: Clean | None, pair: Pair) -> str | None:
    """Why a pair is not kept."""
    if clean is None:
        return None
    shorter, longer = sorted(len(side.split()) for side in pair)
    if shorter < clean.min:
        return "too short"
    if longer > clean.max:
        return "too long"
    return "one side too long for the other" if longer > clean.ratio * shorter else None


def _inputs(recipe: Recipe, base: Path) -> Facts:
    """The recipe and which files it means; files of equal names, sizes and times are taken to be equal."""
    texts = (text for text in (*recipe.train, recipe.valid, recipe.test) if isinstance(text, (str, tuple)))
    names = (named(text, recipe.codes) if isinstance(text, str) else text for text in texts)
    paths = (base / name for name in chain.from_iterable(names))
    stamps = {str(path): os.stat(path) for path in paths if path.exists()}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stamps.items()}
    return {"recipe": recipe.model_dump(mode="json"), "files": files}
