"""Files, base files and overrides: the merged data, and the source of errors."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

import revnets
from revnets.config.errors import ConfigError, option_error
from revnets.config.loader import SpecError, Strict, load
from tests.support.errors import raises_error


class Part(Strict):
    type: str = "plain"
    size: int = Field(default=1, ge=1, examples=[3])
    rate: float = 0.0


class Settings(Strict):
    """Any model; the specification of a network has its own tests."""

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


def fails(given: Any, *overrides: str, **about: Any) -> SpecError:
    """Return the error of loading. `about` contains the arguments of `raises_error`."""
    with raises_error(**about) as caught:
        load(Settings, given, overrides)
    return caught.value


# ----------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("text", "code", "names"),
    [
        ("", "empty-file", "docs/reference/yaml.md"),
        ("# columns: 4\n", "empty-file", "docs/reference/yaml.md"),
        ("---\n", "empty-file", "docs/reference/yaml.md"),
        ("- name\n- part\n", "wrong-format", '["name", "part"]'),
        ("name", "wrong-format", '"name"'),
        ("7", "wrong-format", ": 7 "),
        ("name: one\npart: {size: 1\n", "invalid-syntax", "line 3, column 1"),
        ("name: one\n\tpart: 1\n", "invalid-syntax", "line 2, column 1"),
        ("name: one: two\n", "invalid-syntax", "line 1, column 10"),
        ("name: 'one\n", "invalid-syntax", "end of stream"),
        ("name: one\nname: two\n", "invalid-syntax", ["line 2, column 1", "key name "]),
        ("name: one\npart: {size: 1, size: 1}\n", "invalid-syntax", ["line 2, column 17", "key size "]),
        ("name: one\n1: two\n", "invalid-syntax", ["line 2, column 1", "key 1 "]),
        ("name: one\non: two\n", "invalid-syntax", ["line 2, column 1", "key true ", "in quotes"]),
        ("name: one\nnull: two\n", "invalid-syntax", ["line 2, column 1", "(null)"]),
        ("name: one\n? [a, b]\n: two\n", "invalid-syntax", 'key ["a", "b"]'),
        ("name: one\n---\nname: two\n", "invalid-syntax", "single document"),
        ("name: *one\n", "invalid-syntax", "alias 'one'"),
        ("name: !!python/object:os.system one\n", "invalid-syntax", "constructor"),
        ("name: !!binary aGVsbG8=\n", "invalid-syntax", "constructor"),
        ("name: !!int 0b_\n", "invalid-syntax", "!!int"),
        ("name: one\x00\n", "invalid-syntax", "#x0000"),
        ("name: one\nfree: " + 3000 * "[" + "\n", "invalid-syntax", "brackets"),
        (b"name: \xff\xfe", "invalid-encoding", ["UTF-8", "byte 6"]),
        ("name: one\n".encode("utf-16"), "invalid-encoding", ["UTF-8", "byte 0"]),
    ],
)
def test_file_that_is_not_a_configuration(write, text: str | bytes, code: str, names: str | list[str]) -> None:
    file = write("settings.yaml", text)
    error = fails(file, code=code, key="", source=file, names=names)
    assert str(error).startswith(f"{file}: ")
    assert error.hint


def test_unreadable_file(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("settings.yaml", "name: one")
    missing, elsewhere = tmp_path / "setings.yaml", tmp_path / "other" / "thing.yaml"
    assert fails(missing, code="missing-file", source=missing).hint == f"Did you mean {file}?"
    assert "?" not in fails(elsewhere, code="missing-file", source=elsewhere).hint
    fails(tmp_path, code="not-a-file", source=tmp_path)
    fails(tmp_path / (300 * "x"), code="unreadable-file", names="File name too long")
    fails("settings\0.yaml", code="unreadable-file", names="null byte")

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    fails(file, code="unreadable-file", source=file, names="Permission denied")


def test_values_that_no_configuration_can_contain(write) -> None:
    fails(write("a.yaml", "name: one\nfree: {x: [1.0, -.inf]}"), code="not-finite", key="free.x.1", names="-inf")
    fails(write("b.yaml", "name: one\nfree: &loop {x: *loop}"), code="circular-reference", key="free.x")
    fails({"name": "one", "free": {1: 2}}, code="wrong-type", key="free", names="key 1 ")
    fails({"name": "one", "free": {"x": float("nan")}}, code="not-finite", key="free.x", names="nan")


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


def test_component_of_another_type_is_replaced(write) -> None:
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


def test_errors_name_the_file_of_the_value(write) -> None:
    base = write("base.yaml", "name: one\npart: {size: 0, rate: 0}\nmode: fast\nfree: 3")
    file = write("top.yaml", "base: base.yaml\npart: {rate: 1}\nfree: {}")
    fails(file, code="out-of-range", source=base)
    fails(file, "part.size=0", code="out-of-range", source="command line")
    fails(file, "part.size=1", "mode=quick", code="unknown-choice", source="command line")
    fails(file, "part={rate: x}", code="wrong-type", source="command line")
    mine = write("mine.yaml", "base: base.yaml\npart: {size: 1, rat: 1}")
    fails(mine, code="unknown-key", source=mine)
    none = write("none.yaml", "mode: fast")
    fails(none, code="missing-key", key="name", source=none)
    fails({"name": "one", "mode": 1}, code="unknown-choice", source="dict")


@pytest.mark.parametrize(
    ("base", "code", "key", "names"),
    [
        ("5", "wrong-type", "base", ": 5 "),
        ("[a.yaml, b.yaml]", "wrong-type", "base", '["a.yaml", "b.yaml"]'),
        ("", "wrong-type", "base", "(null)"),
        ("missing/x.yaml", "missing-file", "base", "missing/x.yaml"),
        ("brokn.yaml", "missing-file", "base", ["brokn.yaml", "broken.yaml?"]),
        ("top.yaml", "circular-reference", "base", "(top.yaml -> top.yaml)"),
        ("one.yaml", "circular-reference", "base", "(top.yaml -> one.yaml -> two.yaml -> top.yaml)"),
        ("loop.yaml", "circular-reference", "base", "(loop.yaml -> loop.yaml)"),
        (".", "not-a-file", "", ()),
        ("broken.yaml", "invalid-syntax", "", "broken.yaml: "),
        ('"\\0"', "missing-file", "base", ()),
    ],
)
def test_bad_bases(write, base: str, code: str, key: str, names: str | list[str]) -> None:
    write("one.yaml", "base: two.yaml")
    write("two.yaml", "base: ./top.yaml")
    write("loop.yaml", "base: ../" + os.path.basename(write("broken.yaml", "{").parent) + "/loop.yaml")
    error = fails(write("top.yaml", f"name: one\nbase: {base}"), code=code, key=key, names=names)
    assert error.hint


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
    ("override", "code", "key", "names"),
    [
        ("name", "invalid-override", "name", "levels.2.depth=6"),
        ("=3", "invalid-override", "=3", "levels.2.depth=6"),
        ("part..size=3", "invalid-override", "part..size=3", "levels.2.depth=6"),
        ("items.2.size=3", "invalid-override", "items.2", ["list of length 2", "item 2", "0 to 1"]),
        ("items.-1.size=3", "invalid-override", "items.-1", ["item -1", "0 to 1"]),
        ("items.²=3", "invalid-override", "items.²", ["item ²", "0 to 1"]),
        ("items.size=3", "invalid-override", "items.size", ["item size", "0 to 1"]),
        ("name.size=3", "invalid-override", "name.size", ['"one"', "name as a whole"]),
        ("pair.0=3", "invalid-override", "pair.0", ["(null)", "pair as a whole"]),
        ("free.none.0=3", "invalid-override", "free.none.0", ["item 0", "free.none as a whole"]),
        ("name=[1, 2", "invalid-syntax", "name", ['"[1, 2"', "quotes"]),
        ("name={a: 1, a: 2}", "invalid-syntax", "name", "quotes"),
        ("part.size=0", "out-of-range", "part.size", ["0", "at least 1"]),
        ("part.size=1e3", "wrong-type", "part.size", "1000.0"),
        ("part.rate=.nan", "not-finite", "part.rate", "nan"),
        ("part.sizes=3", "unknown-key", "part.sizes", ["value 3", "Did you mean size?"]),
        ("parts.size=3", "unknown-key", "parts", ['value {"size": 3}', "Did you mean part?"]),
        ("name=", "wrong-type", "name", "(null)"),
    ],
)
def test_bad_overrides(override: str, code: str, key: str, names: str | list[str]) -> None:
    data = {"name": "one", "items": [{}, {}], "pair": None, "free": {"none": []}}
    error = fails(data, override, code=code, key=key, source="command line", names=names)
    assert error.hint


# ----------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("changes", "code", "key", "names"),
    [
        ({"pair": "x"}, "wrong-type", "pair", ['"x"', "a whole number or a list"]),
        ({"pair": [1, "x"]}, "wrong-type", "pair.1", ['"x"', "a whole number"]),
        ({"pair": [1]}, "wrong-length", "pair", "1"),
        ({"mode": "quick"}, "unknown-choice", "mode", ['"quick"', "'slow' or 'fast'"]),
        ({"items": [{"rate": "1e-3"}]}, "number-as-text", "items.0.rate", ["1e-3", "1.0e-3"]),
        ({"items": [{"size": "1e3"}]}, "number-as-text", "items.0.size", ["1e3", "1000"]),
        ({"items": [{"type": "x" * 100}, 3]}, "wrong-type", "items.1", ["3", "mapping"]),
        ({"name": ["x" * 100]}, "wrong-type", "name", '["' + "x" * 55 + "... is a list"),
        ({"name": object}, "wrong-type", "name", "type type"),
        ({"zebra": 1, "name": 3}, "unknown-key", "zebra", "name, part, items, pair, mode, free"),
    ],
)
def test_names_of_wrong_values(changes: dict[str, Any], code: str, key: str, names: str | list[str]) -> None:
    error = fails({"name": "one"} | changes, code=code, key=key, source="dict", names=names)
    assert error.hint


def test_errors_can_be_pickled() -> None:
    error = fails({"name": 3}, code="wrong-type", key="name")
    copy = pickle.loads(pickle.dumps(error))
    for name in ("source", "key", "message", "hint", "code"):
        assert getattr(copy, name) == getattr(error, name)
    assert str(copy) == str(error)


def test_problem_and_remedy_are_aliases_of_message_and_hint() -> None:
    error = fails({"name": 3}, code="wrong-type")
    assert (error.problem, error.remedy) == (error.message, error.hint)


def test_spec_error_is_an_alias_of_config_error() -> None:
    assert issubclass(revnets.SpecError, ConfigError)
    assert isinstance(option_error("--png", "no picture", code="unknown-suffix"), revnets.SpecError)
