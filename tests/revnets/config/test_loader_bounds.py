"""Configurations that are too large or not plain text are rejected before they are built."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from revnets import SpecError, load_spec
from revnets.config.loader import MAX_BASES, MAX_BYTES, MAX_DEPTH, MAX_NODES, Layer, Layers, read_layers
from revnets.config.overrides import apply_overrides, parse_value, set_value
from tests.support.errors import raises_error

LEVEL = {"dim": 8, "depth": 1, "block": "convnext"}
NET = {"columns": 2, "stem": {"type": "patchify", "patch": 4}, "levels": [LEVEL, LEVEL]}
ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))


def merges() -> str:
    lines = ["n0: &n0 {k0: 0, k1: 1}"]
    for n in range(1, 8):
        lines += [f"m{n}{i}: &m{n}{i} {{<<: *n{n - 1}}}" for i in range(8)]
        lines += [f"n{n}: &n{n} {{<<: [{', '.join(f'*m{n}{i}' for i in range(8))}]}}"]
    return "\n".join(lines)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.yaml"


@pytest.mark.parametrize(
    "text",
    [
        ALIASES,
        ALIASES + "? *a8\n: x\n",
        merges(),
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 2 * MAX_DEPTH)),
        f"a: [{'1,' * MAX_NODES}]",
        "#" * (MAX_BYTES + 1),
    ],
    ids=["aliases", "key", "merge keys", "nested aliases", "values", "bytes"],
)
def test_file_that_is_too_large(file: Path, text: str) -> None:
    file.write_text(text)
    with raises_error(code="too-large", source=file, key=""):
        read_layers(file)


def test_largest_file_that_is_read(file: Path) -> None:
    deepest = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    file.write_text(f"a: {deepest}\n# {'x' * 800_000}\nb: [{'1,' * 50_000}]")
    assert len(read_layers(file).data["b"]) == 50_000


@pytest.mark.parametrize("text", ["a: &a {<<: *a, b: 1}", "a: &a {? *a : 1}", "a: &a [*a]"])
def test_values_that_contain_themselves(file: Path, text: str) -> None:
    file.write_text(text)
    with raises_error(code="circular-reference", source=file):
        read_layers(file)


def shared(value: Any, times: int) -> Any:
    for _ in range(times):
        value = [value] * 10
    return value


def nested(value: Any, times: int) -> Any:
    for _ in range(times):
        value = {"a": value}
    return value


@pytest.mark.parametrize("value", [shared("x", 40), nested(1, 2 * MAX_DEPTH)], ids=["shared", "nested"])
def test_data_that_are_too_large(value: Any) -> None:
    with raises_error(code="too-large", source="dict"):
        read_layers({"x": {"y": value}})
    with raises_error(code="too-large", source="command line"):
        set_value(read_layers({}), "x.y", value)


@pytest.mark.parametrize("text", ["a." * 5000 + "b=1", "." * 5000 + "=1"])
def test_an_override_with_too_many_keys(text: str) -> None:
    with raises_error(code="invalid-override", source="command line"):
        load_spec(NET, [text])


def test_origins_are_found_key_by_key() -> None:
    low = Layer("low", {"a": {"b": 1, "c": {"d": 2}}, "e": 3})
    layers = Layers([low, Layer("high", {"a": {"c": {"d": 4}}})])
    assert [layers.origin(keys) for keys in [("a", "b"), ("a", "c", "d"), ("a", "x"), ("x",)]] == [
        *("low", "high", "low", "high")
    ]
    set_value(layers, "a", {"b": 5})
    assert layers.origin(("a", "c", "d")) == "command line"
    assert layers.origin(("e",)) == "low"


def test_unknown_keys_have_constant_cost() -> None:
    """Count function calls while a file and its base file are merged and rejected."""

    def calls(count: int) -> int:
        found = 0

        def note(_frame: object, event: str, _: object) -> None:
            nonlocal found
            found += event in ("call", "c_call")

        given = {f"k{index}": index for index in range(count)}
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            with raises_error(code="unknown-key", key="k0"):
                load_spec({**NET, **Layers([Layer("low", given), Layer("high", given)]).data})
        finally:
            sys.setprofile(before)
        return found

    few, more, most = (calls(count) for count in (500, 1000, 1500))
    assert more - few > 500
    assert most - more < 1.1 * (more - few)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["columns=10000"], "columns"),
        (["columns=10000", "levels.0.depth=10000"], "columns"),
        (["levels.0.depth=10000"], "columns"),
        (["columns=6000", "levels.0.depth=0", "levels.1.depth=0"], "columns"),
    ],
)
def test_network_with_too_many_components(overrides: list[str], key: str) -> None:
    with raises_error(code="out-of-range", key=key):
        load_spec(NET, overrides)


def test_levels_are_counted_before_validation() -> None:
    with raises_error(code="out-of-range", key="levels", names="5000 levels"):
        load_spec({**NET, "levels": [{"dim": "no number"}] * 5000})


def test_connections_of_many_levels_are_bounded() -> None:
    levels = [{**LEVEL, "depth": 0, "stride": 1}] * 200
    with raises_error(code="out-of-range", key="columns", names="connections"):
        load_spec({**NET, "columns": 20, "residual": 0, "reads": ["full"], "levels": levels})


def test_number_of_chained_base_files_is_bounded(tmp_path: Path) -> None:
    for index in range(MAX_BASES + 2):
        (tmp_path / f"{index}.yaml").write_text(f"base: {index + 1}.yaml")
    with raises_error(code="too-large", key="base"):
        read_layers(tmp_path / "0.yaml")


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "fifo.yaml"])
@pytest.mark.parametrize("is_base", [False, True])
def test_pipes_and_devices_are_not_read(tmp_path: Path, name: str, is_base: bool) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "top.yaml").write_text(f"base: {name}")
    with raises_error(code="not-a-file", source=tmp_path / name):
        read_layers(tmp_path / ("top.yaml" if is_base else name))


def test_circular_links(tmp_path: Path) -> None:
    (tmp_path / "link.yaml").symlink_to(tmp_path / "link.yaml")
    with raises_error(code="unreadable-file"):
        read_layers(tmp_path / "link.yaml")
    with raises_error(code="missing-file", key="base"):
        read_layers({"base": str(tmp_path / "link.yaml")})


@pytest.mark.parametrize(
    ("text", "code"),
    [
        *((f"x: {value}", "invalid-syntax") for value in ("!!bool q", "!!map [1]", "!!seq {a: 1}", "!!str [1]")),
        *(
            (f"x: {value}", "invalid-syntax")
            for value in ("!!int ''", "!!int 010", "!!int 1:30", "!!null q", "9" * 5000)
        ),
        *((f"x: {value}", "invalid-syntax") for value in ('"\\U00110000"', "!!float x", "!!value q", "!!merge q")),
        *((f"x: {value}", "invalid-encoding") for value in ('"\\0"', '"\\uD800"', '["\\uDFFF"]')),
        *((f"{key}: 1", "invalid-encoding") for key in ('"\\0"', '"\\uD800"')),
        ("x: 0x" + "f" * 5000, "out-of-range"),
        ("x: -0x" + "f" * 100, "out-of-range"),
    ],
)
def test_values_that_cannot_be_constructed(file: Path, text: str, code: str) -> None:
    file.write_text(text)
    with raises_error(code=code, source=file):
        read_layers(file)
    if text.startswith("x: "):
        with pytest.raises(SpecError):
            apply_overrides(read_layers({}), [text.replace(": ", "=", 1)])


def test_valid_explicit_tag() -> None:
    assert parse_value("[!!float 3, !!int '3', !!bool off, !!null ~, !!str 010]") == [3.0, 3, False, None, "010"]


def test_control_characters_are_shown_as_escapes(file: Path) -> None:
    file.write_text('"k\\e[31m\\u202e": "\\e]0;title\\a"')
    with raises_error(code="unknown-key") as caught:
        load_spec(file)
    assert str(caught.value).isprintable()
    assert caught.value.key == "k\\x1b[31m\\u202e"


def test_invalid_sources() -> None:
    for source in (None, 3, [1]):
        with raises_error(code="empty-file" if source is None else "wrong-format", source="dict"):
            read_layers(source)  # pyright: ignore[reportArgumentType]
