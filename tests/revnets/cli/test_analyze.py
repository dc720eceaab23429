"""The commands `revnets analyze memory` and `gains`: results, files and errors."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import revnets
from revnets import SpecError
from revnets.analysis.gains import MIN_ABS, CellGains, gains_in, gains_of, lost_bits, read_gains
from revnets.analysis.memory_scaling import Step, measured, predicted
from revnets.cli import analyze, output
from revnets.plotting.analysis import gains_figure
from tests.support.errors import raises_error

SPEC = {
    "columns": 3,
    "stem": {"type": "patchify", "in_chans": 1, "patch": 2},
    "levels": [{"dim": dim, "depth": 1, "block": "convnext"} for dim in (8, 16)],
    "head": {"type": "classifier", "num_classes": 5},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    return path


def call(*words) -> tuple[int, str, str]:
    result = CliRunner().invoke(analyze.app, [str(word) for word in words], env={"COLUMNS": "200"})
    if isinstance(result.exception, SpecError):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def table(path: Path) -> list[dict[str, str]]:
    with open(path) as lines:
        return list(csv.DictReader(lines))


# --------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.02), (torch.bfloat16, 0.05)])
def test_predicted_memory_agrees_with_measured_memory(file: Path, dtype: torch.dtype, tolerance: float) -> None:
    step = Step(str(file), (), (3,), ("recompute", "exact"), (1, 32, 32), 8, dtype)
    foreseen, found = list(predicted(step)), list(measured(step))
    assert [(point.columns, point.mode) for point in foreseen] == [(point.columns, point.mode) for point in found]
    for one, other in zip(foreseen, found, strict=True):
        assert one.parameters == other.parameters
        assert one.kept == pytest.approx(other.kept, rel=tolerance)
        assert one.peak == pytest.approx(other.peak, rel=tolerance)


def test_bytes_of_additional_columns(file: Path) -> None:
    """An additional column saves its activations in store, its states in recompute, and lost bits in exact."""
    batch, states = 8, 8 * (16 * 16 * 8 + 8 * 8 * 16)
    step = Step(str(file), (), (3, 4), ("store", "recompute", "exact"), (1, 32, 32), batch, torch.float32)
    kept = {(point.mode, point.columns): point.kept for point in measured(step)}
    slope = {mode: kept[mode, 4] - kept[mode, 3] for mode in step.modes}
    assert slope["recompute"] == pytest.approx(4 * states, rel=0.05)  # bytes of float32
    assert 0.2 * states < slope["exact"] < 0.3 * states  # bytes per element at gamma 0.5
    assert slope["store"] > 5 * slope["recompute"]


def test_memory_command(file: Path, tmp_path: Path) -> None:
    png = tmp_path / "out" / "memory.png"
    size = ("--input", "1,32,32", "--measure-input", "1,16,16", "--batch", 8, "--measure-batch", 2)
    counts = ("--columns", "2,1", "--measure-columns", "2")
    code, out, _ = call("memory", file, "levels.0.dim=4", *size, *counts, "--modes", "exact", "--png", png)
    assert code == 0
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert f"wrote {png} and {png.with_suffix('.csv')}" in out
    rows = table(png.with_suffix(".csv"))
    assert [(row["kind"], row["mode"], row["columns"], row["input"]) for row in rows] == [
        *(("predicted", "exact", columns, "1x32x32") for columns in "12"),
        ("predicted", "exact", "2", "1x16x16"),
        ("measured", "exact", "2", "1x16x16"),
    ]
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    net = revnets.build({**SPEC, "columns": 2}, ["levels.0.dim=4"])
    assert int(rows[-1]["parameters"]) == sum(parameter.nbytes for parameter in net.parameters())


@pytest.mark.parametrize(
    ("words", "code", "key", "names"),
    [
        (("--columns", "1,x"), "wrong-type", "--columns", ["'1,x'", "1,2,4,8"]),
        (("--measure-columns", "0,2"), "wrong-type", "--measure-columns", "'0,2'"),
        (("--modes", "store,exakt"), "unknown-choice", "--modes", ["'exakt'", "Did you mean exact?"]),
        (("--dtype", "int8"), "unknown-choice", "--dtype", ["int8", "float32, bfloat16, float16"]),
        (("--png", "folder.png"), "not-a-file", "--png", "folder.png"),
        (("--png", "m.png", "--csv", "m.png"), "name-clash", "--csv", "m.png"),
        (
            ("--input", "1,32,32", "--measure-input", "2,16,16", "--columns", "1", "--measure-columns", "1"),
            "input-rejected",
            "",
            ["(2, 16, 16)", "--measure-input"],
        ),
    ],
)
def test_errors_of_memory(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    code: str,
    key: str,
    names: str | list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with raises_error(code=code, source="command line" if key else file, key=key, names=names):
        call("memory", file, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "net.yaml"]


def test_model_for_one_image_size_rejects_the_small_step(tmp_path: Path) -> None:
    """Position embeddings require images of one size."""
    file = tmp_path / "vit.yaml"
    levels = [{"dim": 8, "depth": 1, "block": "vit", "heads": 2}] * 2
    stem = {"type": "tokens", "img_size": 96, "patch": 48}
    file.write_text(yaml.safe_dump({"columns": 2, "stem": stem, "fusion": "linear", "levels": levels}))
    with raises_error(code="input-rejected", source=file, names=["3, 64, 64)", "--input", "--measure-input"]):
        call("memory", file, "--columns", "1", "--measure-columns", "1", "--png", tmp_path / "m.png")


def test_model_without_columns(tmp_path: Path, own_modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_modules / "plain_net.py").write_text("import torch\ndef make(columns):\n    return torch.nn.Linear(4, 4)\n")
    monkeypatch.chdir(own_modules)
    with raises_error(code="no-columns", source="plain_net:make", names=["Linear", "reversible columns"]):
        call("memory", "plain_net:make", "--input", "4", "--png", tmp_path / "m.png")
    with raises_error(code="no-columns", source="plain_net:make", names=["Linear", "reversible columns"]):
        call("gains", "plain_net:make", "columns=3", "--png", tmp_path / "g.png")


# ---------------------------------------------------------------------------------------------------------- gains


def trained() -> revnets.Net:
    """A network whose gains differ, some of them negative or below the bound."""
    net = revnets.build(SPEC)
    with torch.no_grad():
        for number, cell in enumerate(net.columns.flat()):
            if cell.gain is not None:
                cell.gain.weight.copy_(torch.linspace(-0.2, 0.1 * number, len(cell.gain.weight)))
    return net


def test_brackets_in_file_names_are_printed(file: Path, tmp_path: Path) -> None:
    """Brackets are not markup of rich."""
    source = file.rename(tmp_path / "a[bold]b.yaml")
    png = tmp_path / "c[red]d.png"
    code, shown, _ = call("gains", source, "--png", png)
    assert code == 0
    assert f"wrote {png} and {png.with_suffix('.csv')}" in shown
    assert str(source) in shown


def test_gains_of_files_equal_those_of_the_model(tmp_path: Path) -> None:
    net, fresh = trained(), revnets.build(SPEC)
    wanted = gains_of(net)
    assert [(cell.column, cell.level, len(cell.gamma)) for cell in wanted] == [
        (column, level, dim) for column in (1, 2) for level, dim in ((0, 8), (1, 16))
    ]
    assert min(float(cell.gamma.min()) for cell in wanted) == pytest.approx(MIN_ABS)
    state, other = net.state_dict(), fresh.state_dict()
    inside = {f"encoder.deep.{name}": tensor for name, tensor in state.items()}
    run, translation = tmp_path / "run" / "checkpoints", tmp_path / "mt"
    run.mkdir(parents=True)
    translation.mkdir()
    torch.save({"model": other, "ema": state, "step": 3}, run / "best.pt")
    torch.save({"model": inside, "args": argparse.Namespace(lr=0.1)}, translation / "checkpoint_best.pt")
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"model": state, "ema": None}, tmp_path / "raw.pt")
    for source in (tmp_path / "run", translation, tmp_path / "plain.pt", tmp_path / "raw.pt"):
        found = read_gains(str(source))
        assert [cell[:2] for cell in found] == [cell[:2] for cell in wanted]
        for one, another in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.gamma, another.gamma)
    from safetensors.torch import save_file

    save_file(state, tmp_path / "weights.safetensors")
    assert torch.equal(read_gains(str(tmp_path / "weights.safetensors"))[2].gamma, found[2].gamma)


def test_gains_are_in_numerical_order() -> None:
    content = {f"cells.{column}.0.gain.weight": torch.tensor([0.1 * column]) for column in (10, 2, 1)}
    assert [cell.column for cell in gains_in(content)] == [1, 2, 10]


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.2, 0.05, MIN_ABS])
def test_lost_bits(gamma: float) -> None:
    found = lost_bits(torch.full((7,), gamma, dtype=torch.float64))
    assert found.expected == pytest.approx(found.kept, rel=0.1)
    assert found.entropy < found.kept
    if gamma in (0.5, 0.05):  # see docs/concepts/numerical-drift.md
        assert found.kept == pytest.approx({0.5: 1.9, 0.05: 5.1}[gamma], abs=0.1)
        assert found.entropy == pytest.approx({0.5: 1.7, 0.05: 4.4}[gamma], abs=0.1)


def test_lost_bits_of_different_channels() -> None:
    """The mean over channels, because all channels have the same number of elements."""
    alone = [lost_bits(torch.tensor([gamma], dtype=torch.float64)) for gamma in (0.5, 0.05)]
    both = lost_bits(torch.tensor([0.5, 0.05], dtype=torch.float64))
    assert both.expected == pytest.approx(sum(bits.expected for bits in alone) / 2)
    assert both.kept == pytest.approx(sum(bits.kept for bits in alone) / 2, rel=0.03)


def test_gains_command(tmp_path: Path) -> None:
    torch.save(trained().state_dict(), tmp_path / "net.pt")
    code, out, _ = call("gains", tmp_path / "net.pt", "--png", tmp_path / "g.svg", "--csv", tmp_path / "numbers.csv")
    assert code == 0
    assert "<svg" in (tmp_path / "g.svg").read_text()
    assert f"wrote {tmp_path / 'g.svg'} and {tmp_path / 'numbers.csv'}" in out
    rows = table(tmp_path / "numbers.csv")
    assert [(row["column"], row["level"], row["channels"]) for row in rows] == [
        (column, level, channels) for column in "12" for level, channels in (("0", "8"), ("1", "16"))
    ]
    gamma = gains_of(trained())[3].gamma
    assert float(rows[3]["median"]) == pytest.approx(float(gamma.median()), rel=0.1)
    assert float(rows[3]["max"]) == pytest.approx(float(gamma.max()), rel=1e-5)
    assert float(rows[3]["bits_kept"]) == pytest.approx(lost_bits(gamma).kept, rel=1e-5)


def test_figures_of_wide_and_of_constant_gains() -> None:
    """The axis is logarithmic if gains differ by decades. Equal gains can be drawn, too."""
    for gains in ([torch.logspace(-3, 0, 50).double()] * 2, [torch.full((5,), 0.5).double()] * 2):
        cells = [CellGains(column, 0, gamma) for column, gamma in enumerate(gains, 1)]
        top, bottom = gains_figure(cells, [lost_bits(cell.gamma, 1000) for cell in cells]).axes
        assert ("10^" in "".join(label.get_text() for label in top.get_yticklabels())) == (len(gains[0]) == 50)
        assert bottom.get_ylim()[1] > lost_bits(gains[0], 1000).kept


def test_errors_of_gains(file: Path, tmp_path: Path) -> None:
    torch.save({"model": {"fc.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    torch.save({"model": print}, tmp_path / "bad.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:100])
    (tmp_path / "cut.safetensors").write_bytes(b"12")
    (tmp_path / "empty").mkdir()
    for words, code, names in (
        (("gains", tmp_path / "no.pt"), "unknown-model", ()),
        (("gains", tmp_path / "empty"), "missing-file", "checkpoints/best.pt, best.pt, checkpoint_best.pt"),
        (("gains", tmp_path / "other.pt"), "no-columns", "gains"),
        (("gains", tmp_path / "bad.pt"), "unsafe-file", "plain data"),
        (("gains", tmp_path / "cut.pt"), "damaged-file", ()),
        (("gains", tmp_path / "cut.safetensors"), "damaged-file", ()),
        (("gains", tmp_path / "other.pt", "columns=3"), "invalid-override", "columns=3"),
        (("gains", file, "columns=1"), "no-columns", "gains"),
    ):
        with raises_error(code=code, source=words[1], key="", names=names):
            call(*words, "--png", tmp_path / "g.png")
        assert not (tmp_path / "g.png").exists()


# --------------------------------------------------------------------------------------------------------- files


def test_existing_csv_is_unchanged_if_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "numbers.csv"
    output.save_csv([{"name": "a,b", "count": 3, "share": 1 / 3}], path)
    assert path.read_text() == 'name,count,share\n"a,b",3,0.333333\n'

    class Broken:
        def __str__(self) -> str:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        output.save_csv([{"name": "c"}, {"name": Broken()}], path)
    assert path.read_text().startswith("name,count,share")
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "g.csv"))

    monkeypatch.setattr(output, "save_csv", full)
    torch.save(trained().state_dict(), tmp_path / "net.pt")
    with raises_error(code="unwritable-file", source=tmp_path / "g.csv", names="No space left on device"):
        call("gains", tmp_path / "net.pt", "--png", tmp_path / "g.png")


def test_invalid_figure_suffix_is_rejected_first(file: Path) -> None:
    code, _, err = call("gains", file, "--png", "x.jpg")
    assert code == 2
    assert all(word in err for word in ("--png", "x.jpg", ".png, .svg, .pdf"))
