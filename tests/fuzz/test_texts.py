"""Damaged and unusual parallel texts: a one-line error, or two sides of equal length."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.parallel_texts import counts_of_lines, numbered_pairs, recipe_for, sub_words

pytest.importorskip("fairseq")

from nlp.data.corpus import TranslationError
from nlp.data.recipe import Recipe
from nlp.data.splits import SPLITS

ODD = [
    *"\r\v\f\x1c\x1d\x1e\x1f\x85\u2028\u2029\0\ufeff\xa0\u200b\u3000\u0301\x07\x7f\ufffe\U0001f600<&|@",
    "@@ ",
    "\r\n",
    "</s>",
]
BROKEN = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xc0\x80"]


def insert_odd(data: bytes, rng: random.Random) -> bytes:
    text = data.decode(errors="ignore")
    for _ in range(rng.randint(1, 40)):
        place = rng.randrange(len(text) + 1)
        text = text[:place] + rng.choice(ODD) + text[place:]
    return text.encode()


def insert_broken(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(BROKEN) + data[place:]


def insert_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    lines.insert(rng.randrange(len(lines)), rng.choice([b"", b"\t", b" ", b"x" * 3000, b"\t\t\t", b"x " * 400]))
    return b"\n".join(lines)


def delete_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    del lines[rng.randrange(len(lines))]
    return b"\n".join(lines)


def other_line_ends(data: bytes, rng: random.Random) -> bytes:
    return data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b"\n\r", b"\xe2\x80\xa8"]), rng.choice([1, -1]))


def insert_tabs(data: bytes, rng: random.Random) -> bytes:
    return data.replace(b" ", b"\t", rng.randint(1, 5))


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))] if data else data


def other_encoding(data: bytes, rng: random.Random) -> bytes:
    return data.decode(errors="ignore").encode(rng.choice(["utf-16", "utf-16-le", "utf-8-sig", "utf-32"]))


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 5) if changed else 0):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def compress(data: bytes, rng: random.Random) -> bytes:
    return gzip.compress(data)


Mutation = Callable[[bytes, random.Random], bytes]
MUTATIONS: list[Mutation] = [insert_odd, insert_broken, insert_line, delete_line, other_line_ends, insert_tabs, cut]
MUTATIONS += [other_encoding, flip, compress, insert_odd, insert_odd]
KINDS = [{}, {"tokenize": False}, {"tokenize": False, "merges": None}, {"clean": None}, {"normalize": "train"}]


def mutated_texts(folder: Path, seed: int) -> Recipe:
    """Return a recipe and its texts: two files or a table, sometimes compressed, for training and test."""
    rng = random.Random(seed)
    given = {"valid": 3, "test": 4, "merges": 5, "deduplicate": rng.random() < 0.5, **rng.choice(KINDS)}
    texts = {}
    for name, first in (("train", 0), ("test", 40)):
        pairs = numbered_pairs(60)[first : first + 40]
        sides = ["".join(line + "\n" for line in side).encode() for side in zip(*pairs, strict=True)]
        if is_table := rng.random() < 0.4:
            sides = ["".join("\t".join(pair) + "\n" for pair in pairs).encode()]
        for _ in range(rng.choice([0, 1, 1, 1, 2])):
            side = rng.randrange(len(sides))
            sides[side] = rng.choice(MUTATIONS)(sides[side], rng)
        ending = rng.choice(["", "", "", ".gz"])
        texts[name] = [folder / f"{name}.{'tsv' if is_table else code}{ending}" for code in ("en", "de")[: len(sides)]]
        for path, side in zip(texts[name], sides, strict=True):
            path.write_bytes(gzip.compress(side) if ending and rng.random() < 0.9 else side)
    if rng.random() < 0.5:
        given["test"] = tuple(texts["test"])
    return recipe_for(texts["train"], **given)


def outcome(folder: Path, seed: int) -> str:
    """Return the code of the error, or "sides" if both sides have equal length for every reader."""
    recipe = mutated_texts(folder, seed)
    try:
        units, facts = sub_words(recipe, folder / "work")
    except TranslationError as error:
        return error.code if len(str(error).splitlines()) == 1 and len(str(error)) < 1000 else "no line"
    for name in (*SPLITS, "raw.test"):
        counts = [counts_of_lines(units / f"{name}.{code}") for code in ("en", "de")]
        assert counts == [{facts[name.removeprefix("raw.")]}] * 2, (seed, name)
    for name in ("valid", "test"):
        if isinstance(getattr(recipe, name), int):
            assert facts[name] == getattr(recipe, name), seed
    return "sides"


def test_two_hundred_texts(tmp_path):
    outcomes = []
    for seed in range(200):
        folder = tmp_path / str(seed)
        folder.mkdir()
        outcomes.append(outcome(folder, seed))
    assert "no line" not in outcomes
    assert outcomes.count("sides") > 40
    assert {"invalid-encoding", "misaligned-data", "wrong-format", "damaged-file"} < set(outcomes)
