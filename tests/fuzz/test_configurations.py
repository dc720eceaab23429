"""Damaged configurations are read, or rejected with a one-line error, in bounded time and memory.

Mutations of the configurations of the packages have fixed seeds, so that failures can be reproduced.
"""

from __future__ import annotations

import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nlp.data.recipe import Recipe
from revnets import SpecError, load_spec
from revnets.config.loader import load
from tests.support.paths import ROOT
from vision.config.run import load_config

SECONDS, MEMORY = 30, 2 << 30
"""Limits of one input, which only endless loops or growing data reach."""

SCALARS = (
    *(
        "~",
        "''",
        "no",
        "off",
        "-1",
        "0",
        "010",
        "1:30",
        "0b11",
        "1_000",
        "1e-3",
        "1e999999",
        ".inf",
        ".nan",
        "2" * 5000,
    ),
    *(f"0x{'f' * 5000}", f"0b{'1' * 5000}", "!!bool q", "!!int ''", "!!map [1]", "!!str {a: 1}", "!!null x", "!x y"),
    *('"\\0"', '"\\uD800"', '"\\e[31m"', '"\\U00110000"', "\u2028", "\x00", "\ud800", "\x1b", "x" * 20000, "9" * 300),
    *("[" * 3000, "{a: " * 3000, "- " * 3000, "? " * 3000, "[x, [], {}]", "{name: x, kind: y, key: z}", "*bomb", "<<"),
    *(
        "~/x",
        "~nobody_/x",
        "/dev/zero",
        "/dev/stdin",
        "..",
        ".",
        "|",
        ">-",
        "'",
        '"',
        "#",
        "&a",
        "*a",
        "&a [*a]",
        "%",
        "@",
    ),
)
KEYS = ("base", "<<", "name", "kind", "key", "source", "type", "=", "1", "~", "? [a]", "columns", "x" * 20000, '"a\\0"')
BOMB = "bomb0: &bomb0 [x, x]\n" + "".join(
    f"bomb{n}: &bomb{n} [{', '.join([f'*bomb{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


def flip(rng: random.Random, text: str) -> bytes:
    data = bytearray(text.encode())
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def shuffle_lines(rng: random.Random, text: str) -> str:
    lines = text.splitlines()
    for _ in range(rng.randint(1, 3)):
        line = lines.pop(rng.randrange(len(lines))) if rng.random() < 0.5 and len(lines) > 1 else rng.choice(lines)
        if rng.random() < 0.7:
            lines.insert(rng.randint(0, len(lines)), " " * rng.choice((0, 0, 2, 5)) + line)
    return "\n".join(lines)


def cut(rng: random.Random, text: str) -> str:
    start, end = sorted((rng.randrange(len(text)), rng.randrange(len(text))))
    return text[:start] + text[end:] * rng.choice((0, 1, 3))


def replace_value(rng: random.Random, text: str) -> str:
    """Replace the value after one of the colons, in a file or in a mapping on one line."""
    colons = [index for index, char in enumerate(text) if char == ":"]
    start = rng.choice(colons) + 1
    end = next((index for index in range(start, len(text)) if text[index] in ",}\n"), len(text))
    changed = f"{text[:start]} {rng.choice(SCALARS)}{text[end:]}"
    return BOMB.replace("bomb8", "bomb") + changed if "*bomb" in changed else changed


def add_key(rng: random.Random, text: str) -> str:
    lines = text.splitlines()
    place = rng.randint(0, len(lines))
    indent = " " * rng.choice((0, 0, 2, 4))
    return "\n".join((*lines[:place], f"{indent}{rng.choice(KEYS)}: {rng.choice(SCALARS)}", *lines[place:]))


def change_type(rng: random.Random, text: str) -> str:
    """Return a valid file in which one value at any depth is replaced."""
    data = yaml.safe_load(text)
    value: Any = data
    while True:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not isinstance(value[key], (dict, list)) or not value[key] or rng.random() < 0.4:
            break
        value = value[key]
    nested: Any = "deep"
    for _ in range(90):
        nested = [nested]
    odd = (None, True, False, -1, 0, 1, 10**9, 2**70, -(10**300), 1e308, 1e-308, "", "x", "~/x", "a\0b", "\ud800", [])
    others = (
        {},
        [[]],
        [1, "a"],
        {"a": {"b": 1}},
        {"type": 1},
        ["a"] * 20000,
        nested,
        {f"k{i}": i for i in range(2000)},
    )
    value[key] = rng.choice((*odd, *others, data))
    return yaml.dump(data)


MUTATIONS: tuple[Callable[[random.Random, str], str | bytes], ...] = (
    *(flip, shuffle_lines, cut, replace_value, replace_value, add_key, change_type, change_type),
)


@pytest.fixture
def bounded() -> Iterator[None]:
    """Limit the memory that the process may allocate in addition."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(read: Callable[[], Any]) -> str:
    """Return the code of the error for a configuration, or "read"."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        read()
    except SpecError as error:
        text = str(error)
        assert text.isprintable(), repr(text)
        assert len(text) < 10_000
        assert "MemoryError" not in text
        assert "not done" not in text
        return error.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return "read"


def check(folder: Path, files: list[Path], read: Callable[[Path], Any], count: int, seed: int) -> set[str]:
    """Count the outcomes of `count` mutations of files in `folder`."""
    rng, found = random.Random(seed), set()
    for number in range(count):
        file, mutate = rng.choice(files), rng.choice(MUTATIONS)
        original = file.read_text(encoding="utf-8")
        text = mutate(rng, original)
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        try:
            found.add(outcome(lambda file=file: read(file)))
        except BaseException as error:
            error.add_note(f"mutation {number} of seed {seed}: {mutate.__name__} of {file.name}: {text[:3000]!r}")
            raise
        finally:
            file.write_text(original, encoding="utf-8")
    return found


def assert_many(found: set[str]) -> None:
    """Assert that some mutations are rejected, and not all for the same reason."""
    assert {"read", "invalid-syntax", "wrong-type"} <= found
    assert len(found) >= 6, found


@pytest.mark.parametrize("seed", [1, 2])
def test_nets(tmp_path: Path, bounded: None, seed: int) -> None:
    folder = shutil.copytree(ROOT / "vision" / "configs", tmp_path / "configs")
    for file in (ROOT / "examples").rglob("*.yaml"):
        shutil.copy(file, folder / "models")
    files = sorted((folder / "models").glob("*.yaml"))
    assert_many(check(folder, files, load_spec, 110, seed))


@pytest.mark.parametrize("seed", [3, 4])
def test_training_runs(tmp_path: Path, bounded: None, seed: int) -> None:
    folder = shutil.copytree(ROOT / "vision" / "configs", tmp_path / "configs")
    files = sorted([*folder.glob("*.yaml"), *folder.glob("finetune/*.yaml"), *folder.glob("ablations/*.yaml")])
    assert_many(check(folder, files, load_config, 110, seed))


def test_translation_recipes(tmp_path: Path, bounded: None) -> None:
    folder = shutil.copytree(ROOT / "nlp" / "configs" / "data", tmp_path / "data")
    assert_many(check(folder, sorted(folder.glob("*.yaml")), lambda file: load(Recipe, file), 110, seed=5))


def test_overrides(bounded: None) -> None:
    rng, found = random.Random(6), set()
    keys = ("epochs", "output", "optimizer.lr", "data", "data.root", "model", "model.columns", "model.levels.0.depth")
    keys = (*keys, "ema", "optimizer.options.betas", "task", "memory", "pretrained.source", "base", "x.y", "a." * 5000)
    for _ in range(100):
        key, value = rng.choice(keys), rng.choice((*SCALARS, "3", "text", "{name: idx, root: ~/x}"))
        value += rng.choice(("", "", "", " # note", "\n", "\r", "\nx: 1", " "))
        override = f"{key}={value}" if rng.random() < 0.95 else value
        found.add(outcome(lambda override=override: load_config("digits", [override])))
    assert_many(found)
