"""Recipes of translation data sets: downloads, files of the splits, tokenization, subwords and cleaning."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from revnets.config.errors import SpecError, nearest, problem
from revnets.config.loader import Strict, UserPath, load

from .corpus import Corpus, Pair, TranslationError, find_files, languages, named
from .download import Download
from .subwords.sentencepiece_model import MAX_VOCAB

RECIPES = Path(__file__).parents[1] / "configs" / "data"
"""Directory of the built-in recipes: `revnets prepare-mt wmt16_en_de` reads `wmt16_en_de.yaml` here."""


def _home(value: Any) -> Any:
    return os.path.expanduser(value) if isinstance(value, str) else value


Text = UserPath | tuple[Annotated[Path, BeforeValidator(_home)], ...]
"""A text: a table, a template of two files where {lang} stands for both languages, or a list of two paths."""


class Every(Strict):
    """Every n-th pair of the training text.

    Attributes:
        every: The number n.
    """

    every: int = Field(gt=1)


class Clean(Strict):
    """Limits of the pairs that are kept, as in Moses' clean-corpus-n.

    Attributes:
        min: Minimum subwords of either side.
        max: Maximum subwords of either side.
        ratio: Maximum ratio of the longer to the shorter side.
    """

    min: int = Field(default=1, ge=1)
    max: int = Field(default=250, ge=1)
    ratio: float = Field(default=1.5, ge=1)

    @model_validator(mode="after")
    def _possible(self) -> Clean:
        if self.min > self.max:
            raise problem(f"min {self.min} exceeds max {self.max}", "Swap them", "min", code="conflicting-values")
        return self

    def drop_reason(self, pair: Pair) -> str | None:
        """Return why a pair of subwords is dropped, or None if it is kept."""
        shorter, longer = sorted(len(side.split()) for side in pair)
        if shorter < self.min:
            return "too short"
        if longer > self.max:
            return "too long"
        return "length ratio too large" if longer > self.ratio * shorter else None


Segmenter = Literal["sentencepiece", "subword-nmt"]
"""Library that learns and applies subwords."""

LATER = ("subword", "vocab", "model_type", "character_coverage")
"""Keys added in later versions. With their defaults, a recipe describes the same data set as before."""


class Recipe(Strict):
    """Everything that determines the content of a prepared data set.

    Attributes:
        languages: Source and target, as in en-de.
        downloads: Archives; texts may name their extracted files.
        train: Texts, concatenated.
        valid: A text; a number of pairs to draw at random from the training text; or every n-th pair of it.
        test: A text, or a number of pairs to draw at random from the training text.
        fields: Fields of a table with source and target, counted from 1.
        tokenize: Apply Moses' tokenizer. Otherwise, tokens are separated by spaces.
        normalize: Texts in which Moses' normalizer unifies quotes, dashes and spaces first: `all`, or only `train`.
            In the others, only the typographic apostrophe is replaced.
        aggressive_dashes: Split words at hyphens, marked @-@.
        merges: Merge operations of joint byte-pair encoding. None if the text already consists of subwords.
        clean: Limits of the pairs of the training text that are kept; None keeps all.
        deduplicate: Drop repeated pairs, and training pairs that share a side with a pair drawn for `valid` or `test`.
        words: Maximum number of types in the dictionary; None for all.
        seed: Seed of the draw.
        subword: Library for subwords. subword-nmt splits the tokens of Moses (`tokenize`). sentencepiece splits raw
            text, so `tokenize`, `normalize`, `aggressive_dashes`, `merges` and `words` cannot be set with it.
        vocab: Size of the joint vocabulary. For sentencepiece the exact number of pieces, by default 8,000 or fewer for
            a small text. For subword-nmt an estimate (`learn-bpe --total-symbols`), instead of `merges`.
        model_type: Kind of sentencepiece model.
        character_coverage: Share of the characters of the text that get a sentencepiece piece.
    """

    languages: str
    downloads: tuple[Download, ...] = ()
    train: tuple[Text, ...] = Field(min_length=1)
    valid: Text | int | Every
    test: Text | int | Every
    fields: tuple[int, int] | None = None
    tokenize: bool = True
    normalize: Literal["all", "train"] = "all"
    aggressive_dashes: bool = False
    merges: int | None = Field(default=10000, ge=1)
    clean: Clean | None = Clean()
    deduplicate: bool = False
    words: int | None = Field(default=None, ge=1)
    seed: int = 1
    subword: Segmenter = "subword-nmt"
    vocab: int | None = Field(default=None, ge=1, le=MAX_VOCAB)
    model_type: Literal["unigram", "bpe"] = "unigram"
    character_coverage: float = Field(default=0.9995, ge=0.98, le=1)

    @field_validator("languages")
    @classmethod
    def _known(cls, text: str) -> str:
        try:
            return "-".join(languages(text))
        except TranslationError as error:
            text, _, remedy = str(error).partition(". ")
            raise problem(text, remedy, code=error.code) from None

    @field_validator("valid", "test")
    @classmethod
    def _some(cls, value: Any) -> Any:
        if isinstance(value, int) and value < 1:
            raise problem(f"{value} pairs is too few", "Use at least 1", code="out-of-range")
        return value

    @field_validator("downloads")
    @classmethod
    def _names_differ(cls, downloads: tuple[Download, ...]) -> tuple[Download, ...]:
        names = Counter(item.file.casefold() for item in downloads)
        if repeated := next((item.file for item in downloads if names[item.file.casefold()] > 1), None):
            raise problem(f"two downloads are named {repeated}", "Set another `name` for one", code="name-clash")
        return downloads

    @model_validator(mode="after")
    def _one_every(self) -> Recipe:
        if isinstance(self.test, Every):
            raise problem(
                "only `valid` can be every n-th pair", "Use a text or a number of pairs", "test", code="wrong-type"
            )
        return self

    @model_validator(mode="after")
    def _one_segmenter(self) -> Recipe:
        """Refuse keys that have no effect."""
        keys = ["model_type", "character_coverage"]
        if self.subword == "sentencepiece":
            keys = ["normalize", "aggressive_dashes", "merges", "words", *(["tokenize"] if self.tokenize else [])]
        if unused := next((key for key in keys if key in self.model_fields_set), None):
            raise problem(
                f"has no effect with subword {self.subword}",
                "Remove it, or use the other subword",
                unused,
                code="conflicting-values",
            )
        if self.vocab is not None and "merges" in self.model_fields_set:
            raise problem("vocab and merges both set the size", "Remove one", "vocab", code="conflicting-values")
        return self

    @property
    def has_pieces(self) -> bool:
        """Whether sentencepiece splits the raw text."""
        return self.subword == "sentencepiece"

    @property
    def has_tokens(self) -> bool:
        """Whether Moses' tokenizer is applied."""
        return self.tokenize and not self.has_pieces

    @property
    def learns_subwords(self) -> bool:
        """Whether subwords are learned from the training text."""
        return self.has_pieces or self.merges is not None

    @property
    def codes(self) -> Pair:
        """Codes of source and target."""
        return languages(self.languages)

    def corpora(self, split: str, folders: Sequence[Path]) -> list[Corpus]:
        """Find the files of a split; none if the split is drawn from the training text.

        Args:
            split: Train, valid or test.
            folders: Directories to search: those of the archives, then that of the recipe.

        Raises:
            TranslationError: If a file is missing.
        """
        texts = self.train if split == "train" else (getattr(self, split),)
        return [
            Corpus(
                find_files(text, folders, self.codes) if isinstance(text, str) else _beside(folders[-1], text),
                self.fields,
                self.codes,
            )
            for text in texts
            if isinstance(text, (str, tuple))
        ]


OWN = {"valid": 2000, "test": 2000, "deduplicate": True}
"""Defaults for a corpus without a recipe; `subword` is sentencepiece then."""


def read_recipe(corpus: Sequence[str], options: Mapping[str, Any]) -> tuple[Recipe, Path]:
    """Read or make the recipe of a command line.

    Args:
        corpus: Name or path of a recipe; or a table; or two files.
        options: Values for keys of the recipe; None if an option is not set.

    Returns:
        The recipe, and the directory that its file names are relative to.

    Raises:
        TranslationError: If the languages of a text are missing.
        revnets.SpecError: If the recipe does not exist or is invalid.
    """
    given = {key: value for key, value in options.items() if value not in (None, {})}
    for key in ("valid", "test"):
        if isinstance(given.get(key), str):
            codes = languages(given["languages"]) if "languages" in given else ("", "")
            given[key] = [str(path.resolve()) for path in named(given[key], codes)]
    recipe = RECIPES / f"{corpus[0]}.yaml"
    if len(corpus) == 1 and (recipe.is_file() or corpus[0].endswith((".yaml", ".yml"))):
        path = recipe if recipe.is_file() else Path(os.path.expanduser(corpus[0]))
        return load(Recipe, path, _overrides(given)), path.resolve().parent
    if len(corpus) == 1 and not Path(corpus[0]).suffix and not os.path.exists(corpus[0]):
        known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
        hint = nearest(corpus[0], known, "Known recipes are")
        raise SpecError(corpus[0], "", "neither a file nor a recipe", hint, code="missing-file")
    if "languages" not in given:
        raise TranslationError(
            f"{' '.join(corpus)}: the languages are missing. Give source and target, such as --languages en-de",
            code="missing-key",
        )
    texts = [[str(Path(name).resolve()) for name in corpus]]
    subword = "subword-nmt" if given.keys() & {"merges", "words"} else "sentencepiece"
    return load(Recipe, {}, _overrides({**OWN, "subword": subword, **given, "train": texts})), Path.cwd()


def _beside(folder: Path, names: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(folder / name for name in names)


def _overrides(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten options to key paths, so that errors name the command line as their source."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": part for name, part in value.items() if part is not None}
        else:
            found[key] = value
    return found
