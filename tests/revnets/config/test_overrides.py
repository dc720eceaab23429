"""Values with a surprising meaning in YAML, on the command line and in files, and paths with `~`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from revnets import load_spec
from revnets.cli.main import main
from revnets.config.loader import Strict, UserPath, load
from revnets.config.overrides import parse_value
from tests.support.errors import raises_error


class Numbers(Strict):
    whole: int = 0
    real: float = 0.0
    text: str = ""
    path: UserPath = ""


@pytest.mark.parametrize("text", ["runs/try #3", "#3", "3 # three", "{a: 1} # b", "[1, #2\n]", "'x' # y"])
def test_text_after_a_hash_is_not_dropped(text: str) -> None:
    with raises_error(code="invalid-syntax", key="text", names="#"):
        parse_value(text, "text")


@pytest.mark.parametrize(
    "text", ["a\nb", "'a\nb'", "a\n", "a\rb", "a\u2028b", "x\ny: 1", "[a\n b]", "{x: 'a\n b'}", "\na"]
)
def test_line_feeds_are_not_dropped(text: str) -> None:
    with raises_error(code="invalid-syntax", key="text"):
        parse_value(text, "text")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("runs/try#3", "runs/try#3"),
        ("'runs/try #3'", "runs/try #3"),
        ('"a\\nb"', "a\nb"),
        ("- {dim: 8}\n- {dim: 9}", [{"dim": 8}, {"dim": 9}]),
        ("{a: 1,\n b: 2}", {"a": 1, "b": 2}),
        ("|\n  a\n  b", "a\nb"),
        (" 3 ", 3),
        ("", None),
        ("1e-3", 1e-3),
        ("1.e+3", 1e3),
        ("-.5", -0.5),
        ("0x1F", 31),
        ("off", False),
        ("2024-05-06", "2024-05-06"),
    ],
)
def test_values_that_are_read_unchanged(text: str, value: object) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


AMBIGUOUS = {
    "010": "10",
    "08": "8",
    "-010": "-10",
    "0b11": "3",
    "0o17": "15",
    "1_000": "1000",
    "0x1_0": "16",
    "1:30": "",
}


@pytest.mark.parametrize("text", [*AMBIGUOUS, "1_0.5", "190:20:30", "1:30.5", "00"])
def test_ambiguous_numbers(tmp_path: Path, text: str) -> None:
    file = tmp_path / "numbers.yaml"
    for key in ("whole", "real"):
        file.write_text(f"{key}: {text}")
        with raises_error(code="number-as-text", key=key, source=file) as caught:
            load(Numbers, file)
        with raises_error(code="number-as-text", key=key, source="command line"):
            load(Numbers, {}, [f"{key}={text}"])
        assert AMBIGUOUS.get(text, "") in caught.value.hint
    file.write_text(f"text: {text}")
    assert load(Numbers, file).text == load(Numbers, {}, [f"text={text}"]).text == text


@pytest.mark.parametrize("text", ["0b_", "0o_", "0x_", "0x1F.5", "0b11.5", "0o17."])
def test_prefixes_of_bases_without_digits(text: str) -> None:
    with raises_error(code="wrong-type", key="real", names=text):
        load(Numbers, {"real": text})


def test_number_with_many_digits_is_matched_in_linear_time() -> None:
    with raises_error(code="number-as-text"):
        load(Numbers, {"whole": "1" * 500_000})
    assert parse_value("1" * 500_000 + "x") == "1" * 500_000 + "x"


def test_yes_and_no_where_text_is_expected() -> None:
    with raises_error(code="wrong-type", key="text", names="quotes"):
        load(Numbers, {}, ["text=no"])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "net.yaml").write_text(
        "columns: 2\nstem: {type: patchify, patch: 4}\nlevels: [&level {dim: 8, depth: 1, block: convnext}, *level]"
    )
    return tmp_path


def test_home_directory_in_paths_of_files_and_base_files(home: Path) -> None:
    (home / "child.yaml").write_text("base: ~/net.yaml\ncolumns: 3")
    assert load_spec("~/child.yaml").columns == 3
    assert load_spec({"base": "~/net.yaml"}).columns == 2


def test_home_directory_in_values(home: Path) -> None:
    assert load(Numbers, {"path": "~/a/~b"}).path == f"{home}/a/~b"
    assert load(Numbers, {}, ["path=~/a"]).path == f"{home}/a"
    assert load(Numbers, {"path": "~root/a"}).path == str(Path("~root/a").expanduser())
    assert load(Numbers, {"path": "./~/a"}).path == "./~/a"
    assert load(Numbers, {"text": "~/a"}).text == "~/a"  # no path


def test_home_directory_that_does_not_exist(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises_error(code="invalid-value", key="path", names="~nobody_at_all"):
        load(Numbers, {"path": "~nobody_at_all/a"})
    monkeypatch.chdir(home)
    (home / "~nobody_at_all").mkdir()
    assert load(Numbers, {"path": "~nobody_at_all/a"}).path == "~nobody_at_all/a"


def status_of_command(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Run a command in a directory without a shell; return its exit status."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["revnets", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_home_directory_in_options_without_a_shell(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["show", "~/net.yaml", "--png=~/net.png", "--svg", "~/net.svg"]
    assert status_of_command(words, home / "..", monkeypatch) == 0
    assert (home / "net.png").exists()
    assert (home / "net.svg").exists()


def test_path_that_is_too_long(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of_command(["show", "x" * 5000], home, monkeypatch) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("number", ["2", "9" * 30, "9" * 5000])
def test_missing_list_item_is_rejected(number: str) -> None:
    with raises_error(code="invalid-override", names=number[:30]):
        load_spec({"columns": 1, "levels": [{"dim": 4, "depth": 1}] * 2}, [f"levels.{number}.dim=3"])
