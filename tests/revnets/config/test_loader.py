"""Files, bases, overrides: what ends up in the data, and who is named when something is wrong."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from revnets.config.loader import SpecError, Strict, load


class Part(Strict):
    type: str = "plain"
    size: int = Field(default=1, ge=1, examples=[3])
    rate: float = 0.0


class Settings(Strict):
    """Any model will do; that of a net is tested in test_spec.py."""

    name: str = Field(examples=["one"])
    part: Part = Part()
    items: list[Part] = []  # noqa: RUF012 - pydantic copies defaults
    pair: int | tuple[int, int] | None = None
    mode: Literal["slow", "fast"] = "slow"
    free: dict[str, Any] = {}  # noqa: RUF012


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str | bytes) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return write


def fails(source: Any, *overrides: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        load(Settings, source, overrides)
    assert "\n" not in str(caught.value)
    return caught.value


# ----------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("text", "problem", "remedy"),
    [
        ("", "the file is empty", "Write `key: value` lines"),
        ("# columns: 4\n", "the file is empty", "Write `key: value` lines"),
        ("---\n", "the file is empty", "Write `key: value` lines"),
        ("- name\n- part\n", 'no keys with values: ["name", "part"] is a list', "Write `key: value` lines"),
        ("name", 'no keys with values: "name" is text', "Write `key: value` lines"),
        ("7", "no keys with values: 7 is a whole number", "Write `key: value` lines"),
        ("name: one\npart: {size: 1\n", "not valid YAML in line 3, column 1", "Correct that line"),
        ("name: one\n\tpart: 1\n", "not valid YAML in line 2, column 1", "Correct that line"),
        ("name: one: two\n", "not valid YAML in line 1, column 10: mapping values are not allowed here", "Correct"),
        ("name: 'one\n", "found unexpected end of stream", "Correct"),
        ("name: one\nname: two\n", "in line 2, column 1: the key name is given twice", "Correct that line"),
        ("name: one\npart: {size: 1, size: 1}\n", "in line 2, column 17: the key size is given twice", "Correct"),
        ("name: one\n1: two\n", "in line 2, column 1: the key 1 is a whole number, not text", "Correct that line"),
        ("name: one\non: two\n", "the key true is a yes/no value, not text; put it in quotes", "Correct that line"),
        ("name: one\nnull: two\n", "line 2, column 1: the key no value is given (null), not text", "Correct that line"),
        ("name: one\n? [a, b]\n: two\n", 'the key ["a", "b"] is a list, not text', "Correct that line"),
        ("name: one\n---\nname: two\n", "expected a single document in the stream but found another", "Correct"),
        ("name: *one\n", "found undefined alias 'one'", "Correct that line"),
        ("name: !!python/object:os.system one\n", "could not determine a constructor", "Correct that line"),
        ("name: !!binary aGVsbG8=\n", "could not determine a constructor", "Correct that line"),
        ("name: 0b_\n", "not valid YAML: invalid literal for int()", "Correct it"),
        ("name: one\x00\n", "unacceptable character #x0000", "Correct it"),
        ("name: one\nfree: " + 3000 * "[" + "\n", "brackets nested too deep", "Close them"),
        (b"name: \xff\xfe", "not UTF-8 text (byte 6)", "Save it as UTF-8"),
        ("name: one\n".encode("utf-16"), "not UTF-8 text (byte 0)", "Save it as UTF-8"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration(write, text: str | bytes, problem: str, remedy: str) -> None:
    file = write("settings.yaml", text)
    error = fails(file)
    assert str(error).startswith(f"{file}: ")
    assert problem in error.problem
    assert remedy in error.remedy


def test_a_file_that_cannot_be_read(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("settings.yaml", "name: one")
    error = fails(tmp_path / "setings.yaml")
    assert "no such file" in error.problem
    assert error.remedy == f"Did you mean {file}?"
    assert fails(tmp_path / "other" / "thing.yaml").remedy == "Check the path"
    assert "this is a folder" in fails(tmp_path).problem
    assert "File name too long" in fails(tmp_path / (300 * "x")).problem
    assert "null byte" in fails("settings\0.yaml").problem

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert "cannot be read (Permission denied)" in fails(file).problem


def test_values_that_no_model_can_mean(write) -> None:
    assert fails(write("a.yaml", "name: one\nfree: {x: [1.0, -.inf]}")).key == "free.x.1"
    assert "contains itself" in fails(write("b.yaml", "name: one\nfree: &loop {x: *loop}")).problem
    assert "the key 1 is a whole number" in fails({"name": "one", "free": {1: 2}}).problem
    assert fails({"name": "one", "free": {"x": float("nan")}}).key == "free.x"


def test_dates_are_text(write) -> None:
    assert load(Settings, write("settings.yaml", "name: 2024-05-06")).name == "2024-05-06"


def test_anchors_and_merge_keys(write) -> None:
    text = "name: one\nitems: [&first {size: 2, rate: 0.5}, *first, {<<: *first, size: 3}]"
    file = write("settings.yaml", text)
    assert load(Settings, file).items == [Part(size=2, rate=0.5), Part(size=2, rate=0.5), Part(size=3, rate=0.5)]
    changed = load(Settings, file, ["items.0.size=7"])  # an alias is a copy, not the same item
    assert [item.size for item in changed.items] == [7, 2, 3]


# ------------------------------------------------------------------------------------------------------------ bases


def test_bases_are_merged_key_by_key(write) -> None:
    write("far/away/root.yaml", "name: root\npart: {size: 2, rate: 0.5}\nitems: [{size: 1}, {size: 2}]\nfree: {a: 1}")
    write("far/middle.yaml", "base: away/root.yaml\npart: {size: 3}\nfree: {b: {c: 2}}")
    file = write("top.yaml", "base: far/middle.yaml\nname: top\nitems: [{size: 9}]\nfree: {b: {d: 3}}")
    settings = load(Settings, file, ["part.rate=0.25"])
    assert settings == Settings(
        name="top",
        part=Part(size=3, rate=0.25),
        items=[Part(size=9)],  # lists are replaced
        free={"a": 1, "b": {"c": 2, "d": 3}},
    )


def test_a_part_of_another_type_is_replaced(write) -> None:
    write("base.yaml", "name: one\npart: {type: plain, size: 2}")
    assert load(Settings, write("a.yaml", "base: base.yaml\npart: {type: odd}")).part == Part(type="odd")
    assert load(Settings, write("b.yaml", "base: base.yaml\npart: {type: plain}")).part == Part(size=2)
    assert load(Settings, write("c.yaml", "base: base.yaml\npart: {rate: 1}")).part == Part(size=2, rate=1)


def test_base_alone_and_base_of_a_dict(write, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write("base.yaml", "name: one")
    assert load(Settings, write("same.yaml", "base: base.yaml")) == Settings(name="one")
    assert load(Settings, write("far/same.yaml", f"base: {base}")) == Settings(name="one")  # an absolute path
    monkeypatch.chdir(base.parent)
    assert load(Settings, {"base": "base.yaml", "mode": "fast"}) == Settings(name="one", mode="fast")


def test_mistakes_are_reported_where_they_stand(write) -> None:
    base = write("base.yaml", "name: one\npart: {size: 0, rate: 0}\nmode: fast\nfree: 3")
    file = write("top.yaml", "base: base.yaml\npart: {rate: 1}\nfree: {}")
    assert fails(file).source == str(base)
    assert fails(file, "part.size=0").source == "command line"
    assert fails(file, "part.size=1", "mode=quick").source == "command line"
    assert fails(file, "part={rate: x}").source == "command line"
    assert fails(write("mine.yaml", "base: base.yaml\npart: {size: 1, rat: 1}")).source.endswith("mine.yaml")
    assert fails(write("none.yaml", "mode: fast")).key == "name"
    assert fails(write("none.yaml", "mode: fast")).source.endswith("none.yaml")
    assert fails({"name": "one", "mode": 1}).source == "dict"


@pytest.mark.parametrize(
    ("base", "problem", "remedy"),
    [
        ("5", "5 is a whole number", "Give the path of one YAML file"),
        ("[a.yaml, b.yaml]", '["a.yaml", "b.yaml"] is a list', "Give the path of one YAML file"),
        ("", "no value is given (null)", "Give the path of one YAML file"),
        ("missing/x.yaml", "there is no file", "Check the path"),
        ("brokn.yaml", "there is no file", "broken.yaml?"),
        ("top.yaml", "based on each other (top.yaml -> top.yaml)", "Break the circle"),
        ("one.yaml", "based on each other (top.yaml -> one.yaml -> two.yaml -> top.yaml)", "Break the circle"),
        ("loop.yaml", "based on each other (loop.yaml -> loop.yaml)", "Break the circle"),
        (".", "this is a folder", "Give a YAML file inside"),
        ("broken.yaml", "not valid YAML", "Correct"),
        ('"\\0"', "there is no file", "Check the path"),
    ],
)
def test_bad_bases(write, base: str, problem: str, remedy: str) -> None:
    write("one.yaml", "base: two.yaml")
    write("two.yaml", "base: ./top.yaml")
    write("loop.yaml", "base: ../" + os.path.basename(write("broken.yaml", "{").parent) + "/loop.yaml")
    error = fails(write("top.yaml", f"name: one\nbase: {base}"))
    assert problem in error.problem
    assert remedy in error.remedy


# -------------------------------------------------------------------------------------------------------- overrides


def test_overrides() -> None:
    data = {"name": "one", "items": [{"size": 1}, {"size": 2}]}
    overrides = ["name=two", "items.1.size = 5", "part.rate=1e-3", "free.a.b=[1E5, x]", "pair=[1, 2]", "free.a.c=a=b"]
    settings = load(Settings, data, overrides)
    assert settings == Settings(
        name="two",
        items=[Part(size=1), Part(size=5)],
        part=Part(rate=1e-3),
        free={"a": {"b": [1e5, "x"], "c": "a=b"}},
        pair=(1, 2),
    )
    assert data == {"name": "one", "items": [{"size": 1}, {"size": 2}]}
    assert load(Settings, data, ["name=two", "name=three"]).name == "three"


@pytest.mark.parametrize(
    ("override", "key", "problem", "remedy"),
    [
        ("name", "name", "an override has the form key.path=value", "levels.2.depth=6"),
        ("=3", "=3", "an override has the form key.path=value", "levels.2.depth=6"),
        ("part..size=3", "part..size=3", "an override has the form key.path=value", "levels.2.depth=6"),
        ("items.2.size=3", "items.2", "items is a list of 2, it has no item 2", "Use 0 to 1"),
        ("items.-1.size=3", "items.-1", "it has no item -1", "Use 0 to 1"),
        ("items.²=3", "items.²", "it has no item ²", "Use 0 to 1"),
        ("items.size=3", "items.size", "it has no item size", "Use 0 to 1"),
        ("name.size=3", "name.size", 'name holds no keys: "one" is text', "Set name as a whole"),
        ("pair.0=3", "pair.0", "pair holds no keys: no value is given", "Set pair as a whole"),
        ("free.none.0=3", "free.none.0", "it has no item 0", "Set free.none as a whole"),
        ("name=[1, 2", "name", '"[1, 2" is not a YAML value', "Put it in quotes"),
        ("name={a: 1, a: 2}", "name", "is not a YAML value", "Put it in quotes"),
        ("part.size=0", "part.size", "0 is too small", "Give at least 1"),
        ("part.size=1e3", "part.size", "1000.0 is a decimal number", "Give a whole number"),
        ("part.rate=.nan", "part.rate", "nan is not a finite number", "Give a finite one"),
        ("part.sizes=3", "part.sizes", "unknown key (value 3)", "Did you mean size?"),
        ("parts.size=3", "parts", 'unknown key (value {"size": 3})', "Did you mean part?"),
        ("name=", "name", "no value is given (null)", "Give text"),
    ],
)
def test_bad_overrides(override: str, key: str, problem: str, remedy: str) -> None:
    data = {"name": "one", "items": [{}, {}], "pair": None, "free": {"none": []}}
    error = fails(data, override)
    assert (error.source, error.key) == ("command line", key)
    assert problem in error.problem
    assert remedy in error.remedy


# ----------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("changes", "key", "problem", "remedy"),
    [
        ({"pair": "x"}, "pair", '"x" is text', "Give a whole number or a list"),
        ({"pair": [1, "x"]}, "pair.1", '"x" is text', "Give a whole number"),
        ({"pair": [1]}, "pair", "the list is too short (1 given)", "Give one value more"),
        ({"mode": "quick"}, "mode", '"quick" is none of the choices', "Choose 'slow' or 'fast'"),
        ({"items": [{"rate": "1e-3"}]}, "items.0.rate", "YAML reads 1e-3 as text", "Write 1.0e-3"),
        ({"items": [{"size": "1e3"}]}, "items.0.size", "YAML reads 1e3 as text", "Write 1000"),
        ({"items": [{"type": "x" * 100}, 3]}, "items.1", "3 is a whole number", "Give a mapping"),
        ({"name": ["x" * 100]}, "name", '["' + "x" * 55 + "... is a list", "Give text"),
        ({"name": object}, "name", "is of type type", "Give text"),
        ({"zebra": 1, "name": 3}, "zebra", "unknown key", "Known keys are name, part, items, pair, mode, free"),
    ],
)
def test_words_for_wrong_values(changes: dict[str, Any], key: str, problem: str, remedy: str) -> None:
    error = fails({"name": "one"} | changes)
    assert error.key == key
    assert problem in error.problem
    assert remedy in error.remedy


def test_errors_cross_process_borders() -> None:
    error = fails({"name": 3})
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.key, copy.remedy) == (str(error), error.key, error.remedy)
