"""From raw parallel text to a fairseq data set: choose, tokenise, learn and apply sub-words, clean, binarise."""

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
from .pieces import DICTIONARY, MODEL, learn_pieces, split_pieces
from .recipe import LATER, Clean, Recipe
from .resumable_steps import NOTE, Facts, Stages
from .sentence_pairs import PairWriter, SentencePair, read_lines, read_pairs, same, segmented, tokenized
from .splits import DROPPED, SPLITS, choose, drawn_counts
from .tokenization import blocks, learn, ordered, segment

CODES = "codes"
"""Operations of byte-pair encoding, in the folder of a data set."""

UNFIT = "unfit.npy"
"""Beside text in sub-words: which pairs of the training text cleaning drops, as far as they were looked at."""

REDRAWN = "redrawn"
"""Folder of the same steps for another draw."""


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
        TranslationError: one line on what is wrong with the data, or another process is making this folder.
    """
    console = console or Console()
    inputs = _inputs(recipe, base)
    stages, named_output, output = Stages(inputs), output, Path(os.path.realpath(output))
    if (facts := stages.facts(output)) is not None:
        text = f"{named_output} is there already, made by the same recipe from the same files"
        console.print(text, soft_wrap=True, markup=False)
        return facts
    read = [*map(Path, inputs["files"]), *([downloads] if recipe.downloads else [])]
    check_replaceable(named_output, read)
    work = output.with_name(output.name + ".work")
    check_inputs(work, read)
    with sole_writer(output):
        if output.exists() and any(output.iterdir()) and not overwrite:
            raise TranslationError(
                f"{named_output} is there, made in another way. Give another --output, or --overwrite to replace it",
                code="settings-differ",
            )
        _check_installed(recipe)
        if recipe.has_tokens and (unsegmented := [code for code in recipe.codes if base_language(code) in UNSEGMENTED]):
            console.print(
                f"warning: {' and '.join(unsegmented)}: Moses' tokenizer does not segment text without spaces, so that "
                "clauses become words. Take --subword sentencepiece, or segment it first and set `tokenize: false` in "
                "a recipe",
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
            with suppress(OSError):  # it is not there, or not empty: it is of use for the next call
                work.rmdir()
        _remove(work, [folder.name for folder in folders])
        return facts


def _cleaned(steps: _Steps, stages: Stages) -> tuple[_Steps, Facts]:
    """All steps up to text in sub-words, with as many pairs in valid and test as the recipe says.

    Which pairs cleaning drops is known only when there are sub-words, and these are learnt from what was not drawn. So
    where one that was drawn is dropped, another is drawn, and the steps are done again: once, rarely twice.
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
    """Delete what was made in the folder of half-done work, and the folder if nothing else is in it."""
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
    """Each fills the folder that it is given, from the folders that were filled before it."""

    recipe: Recipe
    folders: tuple[Path, ...]
    work: Path
    workers: int
    progress: Progress
    before: Path | None = None  # which pairs cleaning dropped, when this was done before

    def choose(self, folder: Path) -> Facts:
        """Read everything once, so that bad input is reported before any work is done, and choose the splits."""
        for corpus in chain.from_iterable(self.recipe.corpora(name, self.folders) for name in SPLITS):
            if self.before is None and (header := corpus.header()):  # else it was printed before
                text = f"{corpus}: line 1 names the columns ({', '.join(header)}), so it is no pair"
                self.progress.console.print(text, soft_wrap=True, markup=False)
        task = self.progress.add_task("read", total=None)
        given = sum(1 for name in SPLITS[1:] for _ in self._read(name, task))
        unfit = None if self.before is None else np.load(self.before)
        chosen, facts = choose(self._read("train", task), self.recipe, unfit)
        self.progress.update(task, total=len(chosen) + given)
        np.save(folder / "chosen.npy", chosen)
        return facts

    def tokenize(self, folder: Path) -> Facts:
        chosen = np.load(self.work / "chosen" / "chosen.npy").tolist()
        task = self.progress.add_task("tokenise" if self.recipe.has_tokens else "select", total=len(chosen))
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
        recipe = self.recipe
        names = [f"train.{code}" for code in recipe.codes]
        if recipe.has_pieces:
            task = self.progress.add_task("learn sub-words", total=None)
            texts = [f"../tokens/{name}" for name in names]
            learnt = learn_pieces(texts, folder, recipe.vocab, recipe.model_type, recipe.character_coverage)
        else:
            assert recipe.merges is not None
            count = recipe.vocab or recipe.merges
            task = self.progress.add_task("learn sub-words", total=count)
            lines = chain.from_iterable(read_lines(self.work / "tokens" / name) for name in names)
            advance = partial(self.progress.advance, task)
            learnt = learn(lines, count, folder / CODES, advance, total=recipe.vocab is not None)
            if recipe.vocab is not None and not learnt:
                raise TranslationError(
                    f"the training text has too many characters for a vocabulary of {count:,}. Give a larger --vocab",
                    code="out-of-range",
                )
        self.progress.update(task, total=learnt, completed=learnt)
        return {"pieces" if recipe.has_pieces else "merges": learnt}

    def split(self, folder: Path) -> Facts:
        """Sub-words; pairs that came from the training text are cleaned by their number."""
        task = self.progress.add_task("split into sub-words", total=None)
        work = partial(segmented, codes=self._codes, segment=split_pieces if self.recipe.has_pieces else segment)
        work = work if self.recipe.learns_subwords else same
        kept, dropped = Counter[str](), Counter[str]()
        own = [name for name in SPLITS if name == "train" or not self.recipe.corpora(name, self.folders)]
        chosen = np.load(self.work / "chosen" / "chosen.npy")
        unfit = np.zeros(len(chosen), bool) if self.before is None else np.load(self.before)
        numbers = {name: iter(np.flatnonzero(chosen == SPLITS.index(name))) for name in own}
        with PairWriter(folder, self.recipe.codes) as writer:
            rows = chain.from_iterable(read_pairs(self.work / "tokens", name, self.recipe.codes) for name in SPLITS)
            for block in ordered(work, blocks(rows), self.workers):
                for row in block:
                    reason = _reason(self.recipe.clean, row.pair) if row.split in own else None
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
                f"no pair is left for {missing[0]}: {why}. Allow longer sentences, or other ratios", code="empty-data"
            )
        self.progress.update(task, total=kept.total() + dropped.total())
        return dict(dropped | kept)

    def binarize(self, folder: Path, output: Path, written: Facts) -> Facts:
        """fairseq-preprocess, and in the same folder the other files that translating and scoring need.

        Args:
            output: the name that the folder is going to have.
            written: how many pairs each split has.
        """
        task = self.progress.add_task("binarise", total=None)
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
        """The file by which text is split."""
        return self.work / "codes" / (MODEL if self.recipe.has_pieces else CODES)

    def _chosen(self, chosen: Sequence[int], task: Any) -> Iterator[SentencePair]:
        """The pairs of the training text that were chosen."""
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
            f"{names}: there were {len(chosen):,} pairs, and now there is another number. Do not change a text while "
            f"it is read; delete {self.work} and run again",
            code="misaligned-data",
        )

    def _read(self, name: str, task: Any = None) -> Iterator[Pair]:
        for corpus in self.recipe.corpora(name, self.folders):
            for block in blocks(corpus.pairs()):
                yield from block
                if task is not None:
                    self.progress.advance(task, len(block))


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
    defaults = {key for key in LATER if getattr(recipe, key) == Recipe.model_fields[key].default}
    return {"recipe": recipe.model_dump(mode="json", exclude=defaults), "files": files}


def _check_installed(recipe: Recipe) -> None:
    """The steps before those that need these packages can take hours."""
    needed = {"fairseq_cli": "fairseq is not installed, which binarises the text"}
    if recipe.has_pieces:
        needed["sentencepiece"] = "sentencepiece is not installed, which splits the text"
    for module, text in needed.items():
        if find_spec(module) is None:
            raise TranslationError(f"{text}. Try: pip install 'revnets[nlp]'", code="missing-dependency")
