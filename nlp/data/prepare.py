"""The pipeline from raw parallel text to a fairseq data set: splits, tokens, subwords, cleaning, binarization."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from revnets.utils.atomic_files import remove_leftovers

from .binarization import LOG, check_sentences, rename_in_log, run_preprocess
from .corpus import Pair, TranslationError, named
from .download import extract_archive, fetch
from .languages import UNSEGMENTED, base_language
from .output_folder import check_inputs, check_replaceable, sole_writer
from .recipe import LATER, Recipe
from .resumable_steps import NOTE, Facts, Stages, read_array
from .sentence_pairs import PairWriter, SentencePair, read_lines, read_pairs, same, segmented, tokenized
from .splits import DROPPED, SPLITS, choose, drawn_counts
from .subwords.byte_pairs import learn, segment
from .subwords.sentencepiece_model import DICTIONARY, MODEL, learn_pieces, split_pieces
from .worker_pool import blocks, ordered

CODES = "codes"
"""File of the merge operations of byte-pair encoding in a data set."""

UNFIT = "unfit.npy"
"""File with one bool for each pair of the training text: whether cleaning is known to drop it."""

REDRAWN = "redrawn"
"""Directory of the same steps after another draw."""


def prepare(
    recipe: Recipe,
    output: Path,
    base: Path = Path(),
    downloads: Path = Path("downloads"),
    workers: int = 1,
    overwrite: bool = False,
    console: Console | None = None,
) -> Facts:
    """Prepare a data set: binarized splits, dictionaries, the subword model, and the raw test set.

    Finished steps are kept in `<output>.work`, and the same call resumes after them. `output` appears when everything
    is done.

    Args:
        recipe: What the data set contains.
        output: Directory to create.
        base: Directory of the files that the recipe names.
        downloads: Directory of the archives.
        workers: Number of processes.
        overwrite: Replace a data set that was made in another way.
        console: Console for messages and progress bars.

    Returns:
        Counts of pairs and types, and of dropped pairs by reason.

    Raises:
        TranslationError: If the data cannot be used, or if another process is writing the directory.
    """
    console = console or Console()
    inputs = _inputs(recipe, base)
    stages, named_output, output = Stages(inputs), output, Path(os.path.realpath(output))
    if (facts := stages.facts(output)) is not None:
        text = f"{named_output} already exists, made from the same recipe and files"
        console.print(text, soft_wrap=True, markup=False)
        return facts
    read = [*map(Path, inputs["files"]), *([downloads] if recipe.downloads else [])]
    check_replaceable(named_output, read)
    work = output.with_name(output.name + ".work")
    check_inputs(work, read)
    with sole_writer(output):
        if output.exists() and any(output.iterdir()) and not overwrite:
            raise TranslationError(
                f"{named_output} exists, made from another recipe or other files. Choose another --output, or replace "
                "it with --overwrite",
                code="settings-differ",
            )
        _check_installed(recipe)
        if recipe.has_tokens and (unsegmented := [code for code in recipe.codes if base_language(code) in UNSEGMENTED]):
            console.print(
                f"warning: {' and '.join(unsegmented)}: Moses' tokenizer does not segment text without spaces, so "
                "clauses become words. Use --subword sentencepiece, or segment the text first and set "
                "`tokenize: false` in a recipe",
                style="yellow",
                soft_wrap=True,
            )
        remove_leftovers(output.parent, output.name)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        try:
            with Progress(*columns, console=console) as progress:
                archives = [fetch(item, downloads, progress) for item in recipe.downloads]
                folders = [extract_archive(archive, work, progress) for archive in archives]
                steps = _Steps(recipe, (*folders, base), work, workers, progress)
                steps, found = _cleaned(steps, stages)

                def fill(folder: Path) -> Facts:
                    facts = found | steps.binarize(folder, output, found)
                    check_replaceable(named_output, read)  # hours may have passed
                    return facts

                facts = stages.run(output, fill)
        finally:
            with suppress(OSError):  # missing, or not empty and useful for the next call
                work.rmdir()
        _remove(work, [folder.name for folder in folders])
        return facts


def _cleaned(steps: _Steps, stages: Stages) -> tuple[_Steps, Facts]:
    """Run all steps up to subwords, with the requested number of pairs in valid and test.

    Cleaning needs subwords, and these are learned from the pairs that are not drawn. If cleaning drops a drawn pair,
    another pair is drawn and the steps are repeated, usually once.
    """
    while True:
        remove_leftovers(steps.work)
        facts = stages.run(steps.work / "chosen", steps.choose)
        stages.run(steps.work / "tokens", steps.tokenize)
        if steps.recipe.learns_subwords:
            facts |= stages.run(steps.work / "codes", steps.learn)
        facts |= stages.run(steps.work / "units", steps.split)
        unfit = steps.work / "units" / UNFIT
        wanted = drawn_counts(steps.recipe)
        if all(facts.get(name, 0) == count for name, count in wanted.items()) or not unfit.exists():
            return steps, facts
        steps = replace(steps, work=steps.work / REDRAWN, before=unfit)


def _remove(work: Path, archives: Sequence[str] = ()) -> None:
    """Delete finished steps and extracted archives from the work directory, and the directory if it is empty."""
    if (work / REDRAWN).exists():
        _remove(work / REDRAWN)
    for folder in (work / name for name in ("chosen", "tokens", "codes", "units", *archives)):
        if (folder / NOTE).exists() or folder.name in archives:
            shutil.rmtree(folder, ignore_errors=True)
    (work / LOG).unlink(missing_ok=True)
    with suppress(OSError):
        work.rmdir()


@dataclass
class _Steps:
    """The steps. Each fills the directory that it gets, from the directories of earlier steps.

    Attributes:
        recipe: What the data set contains.
        folders: Directories to search for files of the recipe.
        work: Directory of the steps.
        workers: Number of processes.
        progress: Receives a progress bar for each step.
        before: After another draw, the file of the pairs that cleaning dropped.
    """

    recipe: Recipe
    folders: tuple[Path, ...]
    work: Path
    workers: int
    progress: Progress
    before: Path | None = None

    def choose(self, folder: Path) -> Facts:
        """Read everything once, so that invalid input is reported early, and assign pairs to splits."""
        for corpus in chain.from_iterable(self.recipe.corpora(name, self.folders) for name in SPLITS):
            if self.before is None and (header := corpus.header()):  # otherwise already printed
                text = f"{corpus}: line 1 names the columns ({', '.join(header)}) and is skipped"
                self.progress.console.print(text, soft_wrap=True, markup=False)
        task = self.progress.add_task("read", total=None)
        given = sum(1 for name in SPLITS[1:] for _ in self._read(name, task))
        unfit = None if self.before is None else read_array(self.before, bool)
        chosen, facts = choose(self._read("train", task), self.recipe, unfit)
        self.progress.update(task, total=len(chosen) + given)
        np.save(folder / "chosen.npy", chosen)
        return facts

    def tokenize(self, folder: Path) -> Facts:
        """Tokenize the pairs of all splits."""
        chosen = self._choice().tolist()
        task = self.progress.add_task("tokenize" if self.recipe.has_tokens else "select", total=len(chosen))
        train = self._chosen(chosen, task)
        given = (SentencePair(name, pair, pair) for name in SPLITS[1:] for pair in self._read(name))
        work = partial(tokenized, codes=self.recipe.codes, dashes=self.recipe.aggressive_dashes)
        with PairWriter(folder, self.recipe.codes) as writer:
            for rows, normalize in ((train, True), (given, self.recipe.normalize == "all")):
                function = partial(work, normalize=normalize) if self.recipe.has_tokens else same
                for row in chain.from_iterable(ordered(function, blocks(rows), self.workers)):
                    writer.write(row)
        return {}

    def learn(self, folder: Path) -> Facts:
        """Learn subwords from the training split."""
        recipe = self.recipe
        names = [f"train.{code}" for code in recipe.codes]
        if recipe.has_pieces:
            task = self.progress.add_task("learn subwords", total=None)
            texts = [f"../tokens/{name}" for name in names]

            def report(state: str) -> None:
                self.progress.update(task, description=f"learn subwords: {state}")

            learned = learn_pieces(texts, folder, recipe.vocab, recipe.model_type, recipe.character_coverage, report)
        else:
            assert recipe.merges is not None
            count = recipe.vocab or recipe.merges
            task = self.progress.add_task("learn subwords", total=count)
            lines = chain.from_iterable(read_lines(self.work / "tokens" / name) for name in names)
            advance = partial(self.progress.advance, task)
            learned = learn(lines, count, folder / CODES, advance, total=recipe.vocab is not None)
            if recipe.vocab is not None and not learned:
                raise TranslationError(
                    f"--vocab {count} is too small: the characters of the training text alone need as many types. "
                    "Use a larger --vocab",
                    code="out-of-range",
                )
        self.progress.update(task, description="learn subwords", total=learned, completed=learned)
        return {"pieces" if recipe.has_pieces else "merges": learned}

    def split(self, folder: Path) -> Facts:
        """Split all pairs into subwords, and clean those that came from the training text."""
        task = self.progress.add_task("split into subwords", total=None)
        work = partial(segmented, codes=self._codes, segment=split_pieces if self.recipe.has_pieces else segment)
        work = work if self.recipe.learns_subwords else same
        kept, dropped, clean = Counter[str](), Counter[str](), self.recipe.clean
        own = [name for name in SPLITS if name == "train" or not self.recipe.corpora(name, self.folders)]
        chosen = self._choice()
        unfit = np.zeros(len(chosen), bool) if self.before is None else read_array(self.before, bool)
        numbers = {name: iter(np.flatnonzero(chosen == SPLITS.index(name))) for name in own}
        with PairWriter(folder, self.recipe.codes) as writer:
            rows = chain.from_iterable(read_pairs(self.work / "tokens", name, self.recipe.codes) for name in SPLITS)
            for block in ordered(work, blocks(rows), self.workers):
                for row in block:
                    reason = clean.drop_reason(row.pair) if clean and row.split in own else None
                    number = next(numbers[row.split]) if row.split in own else None
                    if reason:
                        dropped[reason] += 1
                        unfit[number] = True
                    else:
                        kept[row.split] += 1
                        writer.write(row)
                self.progress.advance(task, len(block))
        np.save(folder / UNFIT, unfit)
        drawn = drawn_counts(self.recipe)
        if missing := [name for name in SPLITS if not kept[name] and name not in drawn]:
            why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            raise TranslationError(
                f"no pair is left for {missing[0]}: {why}. Allow longer sentences or larger ratios", code="empty-data"
            )
        self.progress.update(task, total=kept.total() + dropped.total())
        return dict(dropped | kept)

    def binarize(self, folder: Path, output: Path, written: Facts) -> Facts:
        """Run fairseq-preprocess, and add the other files that translation and scoring need.

        Args:
            folder: Directory to fill.
            output: Final name of the directory.
            written: Number of pairs of each split.
        """
        task = self.progress.add_task("binarize", total=None)
        recipe, units = self.recipe, self.work / "units"
        dictionary = self._codes.with_name(DICTIONARY) if recipe.has_pieces else None
        run_preprocess(units, folder, recipe.codes, recipe.words, self.workers, self.work / LOG, dictionary)
        check_sentences(folder, recipe.codes, written)
        rename_in_log(folder, output)
        if recipe.learns_subwords:
            shutil.copy(self._codes, folder)
        if recipe.has_tokens or recipe.has_pieces:
            for code in recipe.codes:
                shutil.copy(units / f"raw.test.{code}", folder / f"test.raw.{code}")
        self.progress.update(task, total=1, completed=1)
        return {"types": sum(1 for _ in read_lines(folder / f"dict.{recipe.codes[0]}.txt"))}

    @property
    def _codes(self) -> Path:
        """File of the subword model."""
        return self.work / "codes" / (MODEL if self.recipe.has_pieces else CODES)

    def _chosen(self, chosen: Sequence[int], task: Any) -> Iterator[SentencePair]:
        """Yield the pairs of the training text that were assigned to a split."""
        indices = iter(chosen)
        for pair in self._read("train", task):
            index = next(indices, None)
            if index is None:
                break
            if index != DROPPED:
                yield SentencePair(SPLITS[index], pair, pair)
        else:
            if next(indices, None) is None:
                return
        names = " and ".join(map(str, self.recipe.corpora("train", self.folders)))
        raise TranslationError(
            f"{names}: the number of pairs is no longer {len(chosen):,}. Do not change a text while it is read: delete "
            f"{self.work} and run again",
            code="misaligned-data",
        )

    def _choice(self) -> np.ndarray:
        """Read the assignment of pairs to splits."""
        return read_array(self.work / "chosen" / "chosen.npy", np.int8)

    def _read(self, name: str, task: Any = None) -> Iterator[Pair]:
        for corpus in self.recipe.corpora(name, self.folders):
            for block in blocks(corpus.pairs()):
                yield from block
                if task is not None:
                    self.progress.advance(task, len(block))


def _inputs(recipe: Recipe, base: Path) -> Facts:
    """Return the recipe and its files. Files of the same name, size and modification time are considered equal."""
    texts = (text for text in (*recipe.train, recipe.valid, recipe.test) if isinstance(text, (str, tuple)))
    names = (named(text, recipe.codes) if isinstance(text, str) else text for text in texts)
    paths = (base / name for name in chain.from_iterable(names))
    stamps = {str(path): os.stat(path) for path in paths if path.exists()}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stamps.items()}
    defaults = {key for key in LATER if getattr(recipe, key) == Recipe.model_fields[key].default}
    return {"recipe": recipe.model_dump(mode="json", exclude=defaults), "files": files}


def _check_installed(recipe: Recipe) -> None:
    """Check for packages that late steps need, before the first steps take hours."""
    needed = {"fairseq_cli": "fairseq, which binarizes the text, is not installed"}
    if recipe.has_pieces:
        needed["sentencepiece"] = "sentencepiece, which splits the text, is not installed"
    for module, text in needed.items():
        if find_spec(module) is None:
            raise TranslationError(f"{text}. Try: pip install 'revnets[nlp]'", code="missing-dependency")
