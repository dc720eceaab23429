"""How a data set for translation is made: what to download, which files are what, how text becomes sub-words."""

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

RECIPES = Path(__file__).parents[1] / "configs" / "data"
"""Recipes that come along: `revnets prepare-mt wmt16_en_de` means `configs/data/wmt16_en_de.yaml`."""


def _home(value: Any) -> Any:
    return os.path.expanduser(value) if isinstance(value, str) else value


Text = UserPath | tuple[Annotated[Path, BeforeValidator(_home)], ...]
"""A text: the name of a table, or of two files, where {lang} stands for each language; or the two paths."""


class Every(Strict):
    """One line of the training text in so many."""

    every: int = Field(gt=1)


class Clean(Strict):
    """What Moses' clean-corpus-n keeps: lengths in sub-words, and how often the longer side has the shorter one's."""

    min: int = Field(default=1, ge=1)
    max: int = Field(default=250, ge=1)
    ratio: float = Field(default=1.5, ge=1)

    @model_validator(mode="after")
    def _possible(self) -> Clean:
        if self.min > self.max:
            raise problem(f"min {self.min} is more than max {self.max}", "Swap them", "min", code="conflicting-values")
        return self


Segmenter = Literal["sentencepiece", "subword-nmt"]
"""What learns and splits sub-words."""

LATER = ("subword", "vocab", "model_type", "character_coverage")
"""Keys added later. At their defaults they do not change which data set a recipe describes."""


class Recipe(Strict):
    """Everything that decides what a prepared data set contains.

    Attributes:
        languages: source and target, as in en-de.
        downloads: archives whose unpacked files the texts may name.
        train: texts, read one after the other.
        valid, test: a text; so many pairs of the training text, drawn at random; or every n-th pair of it.
        fields: which fields of a table hold source and target.
        tokenize: split words from punctuation as Moses does. Without it, text is taken as tokens between spaces.
        normalize: unify quotes, dashes and spaces first, in the texts named. Where not, only the typographic
            apostrophe becomes a plain one.
        aggressive_dashes: split words at hyphens as well, marked @-@.
        merges: operations of byte-pair encoding, learnt jointly. None: the text is in sub-words already.
        clean: which pairs of the training text are kept; None keeps all.
        deduplicate: keep the first of equal pairs, and none that shares a side with a pair drawn for `valid` or `test`.
        words: at most so many types in the dictionary. All of them unless given.
        seed: of the draw.
        subword: what learns and splits sub-words. subword-nmt splits the tokens of Moses (`tokenize`), sentencepiece
            raw text, so that `tokenize`, `normalize`, `aggressive_dashes`, `merges` and `words` do not go with it.
        vocab: size of the joint vocabulary. For sentencepiece exactly so many pieces; by default 8,000, or fewer if
            the text has not as many. For subword-nmt an estimate (`learn-bpe --total-symbols`), in place of `merges`.
        model_type: of sentencepiece.
        character_coverage: the share of the text's characters that sentencepiece makes pieces of.
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
    vocab: int | None = Field(default=None, ge=1)
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
            raise problem(f"{value} pairs are too few", "Draw at least 1", code="out-of-range")
        return value

    @field_validator("downloads")
    @classmethod
    def _names_differ(cls, downloads: tuple[Download, ...]) -> tuple[Download, ...]:
        names = Counter(item.file.casefold() for item in downloads)
        if repeated := next((item.file for item in downloads if names[item.file.casefold()] > 1), None):
            raise problem(f"two downloads are called {repeated}", "Give one another `name`", code="name-clash")
        return downloads

    @model_validator(mode="after")
    def _one_every(self) -> Recipe:
        if isinstance(self.test, Every):
            raise problem(
                "only `valid` can be every n-th pair", "Give a text, or a number of pairs", "test", code="wrong-type"
            )
        return self

    @model_validator(mode="after")
    def _one_segmenter(self) -> Recipe:
        """Every key that is given has an effect."""
        keys = ["model_type", "character_coverage"]
        if self.subword == "sentencepiece":
            keys = ["normalize", "aggressive_dashes", "merges", "words", *(["tokenize"] if self.tokenize else [])]
        if unused := next((key for key in keys if key in self.model_fields_set), None):
            raise problem(
                f"has no effect with subword {self.subword}",
                "Leave it out, or choose the other subword",
                unused,
                code="conflicting-values",
            )
        if self.vocab is not None and "merges" in self.model_fields_set:
            raise problem("vocab and merges both give a size", "Keep one", "vocab", code="conflicting-values")
        return self

    @property
    def has_pieces(self) -> bool:
        """Whether sentencepiece splits raw text."""
        return self.subword == "sentencepiece"

    @property
    def has_tokens(self) -> bool:
        """Whether Moses' tokenizer is applied."""
        return self.tokenize and not self.has_pieces

    @property
    def learns_subwords(self) -> bool:
        return self.has_pieces or self.merges is not None

    @property
    def codes(self) -> Pair:
        return languages(self.languages)

    def corpora(self, split: str, folders: Sequence[Path]) -> list[Corpus]:
        """The texts of train, valid or test, as files; none where the split is taken from the training text.

        Args:
            folders: where their names are looked for: those of archives, then that of the recipe.

        Raises:
            TranslationError: a file is missing.
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
"""For a corpus without a recipe, where no option says otherwise. `subword` is sentencepiece then."""


def read_recipe(corpus: Sequence[str], options: Mapping[str, Any]) -> tuple[Recipe, Path]:
    """The recipe that the command line means, and the folder that names of files in it are relative to.

    Args:
        corpus: name or path of a recipe; or a table; or two files.
        options: values for keys of the recipe; None where nothing was given.

    Raises:
        TranslationError: text without its languages.
        SpecError: there is no such recipe, or something in it is wrong.
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
        raise SpecError(
            corpus[0], "", "neither a file nor a recipe", nearest(corpus[0], known, "Recipes are"), code="missing-file"
        )
    if "languages" not in given:
        raise TranslationError(
            f"{' '.join(corpus)}: which languages? Give source and target, such as --languages en-de",
            code="missing-key",
        )
    texts = [[str(Path(name).resolve()) for name in corpus]]
    subword = "subword-nmt" if given.keys() & {"merges", "words"} else "sentencepiece"
    return load(Recipe, {}, _overrides({**OWN, "subword": subword, **given, "train": texts})), Path.cwd()


def _beside(folder: Path, names: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(folder / name for name in names)


def _overrides(values: Mapping[str, Any]) -> dict[str, Any]:
    """Key paths and values for the configuration, so that errors name the command line as their source."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": part for name, part in value.items() if part is not None}
        else:
            found[key] = value
    return found
