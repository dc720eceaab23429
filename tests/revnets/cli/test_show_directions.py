"""Output of `revnets show` for columns that run down."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from revnets.cli import main

NET = """\
columns: {up: 5, down: 6}
stem: {type: patchify, patch: 2}
levels:
  - {dim: 5, depth: 0, block: convnext}
  - {dim: 7, depth: 0, block: convnext}
constant: {column: 9, positions: [POSITIONS]}
"""


def shown(tmp_path: Path, positions: str) -> list[list[str]]:
    """Return the cells of all rows of all tables."""
    file = tmp_path / "net.yaml"
    file.write_text(NET.replace("POSITIONS", positions))
    result = CliRunner().invoke(main.app, ["show", str(file), "--input", "3,12,20"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.exception
    assert "11 columns of 2 levels, 6 of them down, memory exact" in result.stdout
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in result.stdout.splitlines() if "│" in line]


def test_tables(tmp_path: Path) -> None:
    found = shown(tmp_path, "3, 5")
    assert [row[:3] + row[4:5] for row in found[:2]] == [
        ["0", "5", "6 x 10", "stem, above c0.l1"],
        ["1", "7", "3 x 5", "below c1.l0"],
    ]
    assert [row[:2] for row in found[2:4]] == [["1", "above c5.l0"], ["0", "below c6.l1"]]
    cells = [row for row in found[4:]]
    shown_columns = list(dict.fromkeys(row[0].partition(".")[0] for row in cells))
    assert shown_columns == ["c0", "c1", "c2", "", "c5", "c6", "c9", "c10"]  # "..." occurs twice
    assert ["c5.l1", "c4.l0", "c4.l1"] in cells
    assert ["c9.l1", "c8.l0, constant", "c8.l1"] in cells
    assert [row[0] for row in cells].count("...") == 2


def test_error_names_a_constant_that_does_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "net.yaml"
    file.write_text(NET.replace("POSITIONS", "5, 3"))
    result = CliRunner().invoke(main.app, ["show", str(file), "--input", "3,12,20"])
    error = result.exception
    assert (error.code, error.source) == ("input-rejected", str(file))  # pyright: ignore
    assert "(5, 3)" in str(error)
    assert "(3, 5)" in str(error)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_pictures(tmp_path: Path, kind: str) -> None:
    file, picture = tmp_path / "net.yaml", tmp_path / f"net.{kind}"
    file.write_text(NET.replace("POSITIONS", ""))
    result = CliRunner().invoke(main.app, ["show", str(file), "--input", "3,12,20", f"--{kind}", str(picture)])
    assert result.exit_code == 0, result.exception
    assert picture.stat().st_size > 1000
