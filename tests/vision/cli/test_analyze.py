"""The commands `revnets analyze cka` and `layercam` on a run and on models: files, options and errors."""

from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from revnets import SpecError
from tests.support.errors import raises_error
from tests.support.image_folders import bomb
from tests.support.training_runs import tiny
from vision.analysis.cka import Similarity, similarity
from vision.analysis.figures import cka_figure, layercam_figure
from vision.analysis.inputs import batch_plan, image_at, image_from, load_source
from vision.analysis.layercam import layercam
from vision.cli import analyze
from vision.config.run import load_config
from vision.training.trainer import Trainer

app = typer.Typer()
app.command("cka")(analyze.cka)
app.command("layercam")(analyze.layercam)


def call(*words) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if isinstance(result.exception, SpecError):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def table(path: Path) -> list[dict[str, str]]:
    with open(path) as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The directory of a finished run."""
    folder = tmp_path_factory.mktemp("analyze") / "run"
    Trainer(load_config(tiny(folder, epochs=1))).fit()
    return folder


def test_cka_of_a_run(run: Path, tmp_path: Path) -> None:
    png = tmp_path / "cka.png"
    code, out, _ = call("cka", run, "--batch", 30, "--batches", 2, "--png", png)
    assert code == 0
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert f"wrote {png} and {tmp_path / 'cka.csv'}" in out
    assert "CKA by level, over 60 images in batches of 30" in out
    rows = table(tmp_path / "cka.csv")
    assert [(row["column"], row["level"]) for row in rows] == [(c, l) for c in "012" for l in "01"]  # noqa: E741
    subject, columns = load_source(str(run))
    order = torch.randperm(360, generator=torch.Generator().manual_seed(1))[:60]  # by the seed of the run
    images, labels = (torch.stack(parts) for parts in zip(*(subject.data.val[int(i)] for i in order), strict=True))
    batches = zip(images.split(30), labels.split(30), strict=True)
    wanted = similarity(subject.model, columns, batches)
    assert [float(row["labels"]) for row in rows] == pytest.approx(wanted.labels.flatten().tolist(), rel=1e-4)
    assert [float(row["images"]) for row in rows] == pytest.approx(wanted.images.flatten().tolist(), rel=1e-4)


def test_batches_of_a_run(run: Path) -> None:
    subject, _ = load_source(str(run))
    assert batch_plan(subject, 512, 3) == (360, 1)
    assert batch_plan(subject, 100, 0) == (100, 4)
    assert batch_plan(subject, 100, 2) == (100, 2)
    first, *_ = subject.val_batches(7, 2, shuffled=False)
    assert torch.equal(first[0], torch.stack([subject.data.val[index][0] for index in range(7)]))
    whole = list(subject.val_batches(100, None, shuffled=True))
    assert [len(labels) for _, labels in whole] == [100, 100, 100, 60]
    assert torch.cat([labels for _, labels in whole]).bincount().tolist() == subject.data.val.labels.bincount().tolist()


def test_weights_of_a_run_and_of_its_average(run: Path) -> None:
    raw, ema, auto = (load_source(str(run), weights=kind)[0].model.state_dict() for kind in ("raw", "ema", "auto"))
    assert all(torch.equal(ema[name], auto[name]) for name in ema)
    assert not torch.equal(raw["stem.conv.weight"], ema["stem.conv.weight"])


def test_layercam_of_a_run_in_every_memory_mode(run: Path, tmp_path: Path) -> None:
    written = {}
    for mode in ("store", "exact"):
        png = tmp_path / f"{mode}.png"
        code, out, _ = call("layercam", run, "--index", 5, "--png", png, f"memory={mode}")
        assert code == 0
        assert png.read_bytes()[:4] == b"\x89PNG"
        written[mode] = (tmp_path / f"{mode}.csv").read_text()
    assert written["store"] == written["exact"]
    subject, columns = load_source(str(run))
    image, label = image_at(subject, 5)
    found = layercam(subject.model, columns, image)
    assert f"true: {subject.data.classes[label]}" in out
    assert f"predicted: {subject.data.classes[int(found.classes)]}" in out
    rows = table(tmp_path / "exact.csv")
    values = torch.tensor([float(row["value"]) for row in rows])
    torch.testing.assert_close(values, torch.cat([of_state.flatten() for of_state in found.maps]), rtol=1e-4, atol=1e-7)


def test_layercam_of_another_picture_and_another_class(run: Path, tmp_path: Path) -> None:
    """The image file of a digit has the result of the digit."""
    subject, _ = load_source(str(run))
    pixels = subject.pixels(subject.data.val[3][0])[..., 0]
    Image.fromarray((pixels * 255).round().byte().numpy()).save(tmp_path / "digit.png")
    torch.testing.assert_close(
        image_from(subject, tmp_path / "digit.png")[0], subject.data.val[3][0], atol=0.01, rtol=0
    )
    code, out, _ = call(
        "layercam", run, "--image", tmp_path / "digit.png", "--class", "7", "--png", tmp_path / "map.png"
    )
    assert code == 0
    assert "true:" not in out
    assert "shown: 7" in out or "predicted: 7" in out


def test_a_name_of_timm(tmp_path: Path) -> None:
    code, _, _ = call(
        "cka", "test_revcol", "data.img_size=32", "model.columns=2", "--batch", 16, "--png", tmp_path / "cka.png"
    )
    assert code == 0
    assert len(table(tmp_path / "cka.csv")) == 8
    subject, again = (
        load_source("test_revcol", ["data.img_size=32", "model.columns=2", "seed=3"])[0] for _ in range(2)
    )
    assert torch.equal(subject.model.stem.conv.weight, again.model.stem.conv.weight)
    assert not subject.model.training
    assert load_source("digits")[1].graph.columns == 4  # a recipe


def test_wrong_arguments_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty").mkdir()
    for words, code, key, names in (
        (("cka", "revcol_tinny"), "unknown-model", "", ["revcol_tinny", "Did you mean revcol_tiny?"]),
        (("cka", "test_resnet"), "no-columns", "", "test_resnet"),
        (("cka", run, "batch_sise=3"), "unknown-key", "batch_sise", "batch_size?"),
        (("cka", "test_revcol", "model.num_classes=3"), "class-mismatch", "model.num_classes", ["3 ", "10 classes"]),
        (("layercam", run, "--index", 360), "out-of-range", "--index", "360"),
        (("layercam", run, "--class", "eleven"), "unknown-choice", "--class", ["'eleven'", "0, 1, 2"]),
        (("layercam", run, "--image", tmp_path / "no.jpg"), "unreadable-file", "--image", ["no.jpg", "No such file"]),
        (
            ("layercam", run, "--image", tmp_path / "text.jpg"),
            "unreadable-file",
            "--image",
            ["text.jpg", "not an image"],
        ),
    ):
        with raises_error(code=code, key=key, names=names):
            call(*words, "--png", tmp_path / "x.png")
    for words in (("cka", tmp_path / "empty"), ("cka", tmp_path / "text.jpg")):
        code, out, err = call(*words, "--png", tmp_path / "x.png")
        assert (code, err.count("\n"), "Traceback" in out + err) == (1, 1, False)
        assert str(words[1]) in err
    assert not list(tmp_path.glob("x.*"))


def test_figures_of_many_columns_and_of_what_is_not_defined() -> None:
    values = torch.full((33, 4), 0.3, dtype=torch.float64)
    values[-1, 3] = torch.nan
    left, right, _ = cka_figure(Similarity(values, values, 9)).axes
    assert not left.texts
    assert left.get_xlim() == right.get_xlim() == (-0.5, 32.5)
    few = cka_figure(Similarity(values[-2:], values[-2:], 9)).axes[0]
    assert [text.get_text() for text in few.texts] == [".30"] * 7


def test_layercam_figure_shows_map_and_image() -> None:
    """Where a map is high its color dominates, where it is low the image; a map of zeros changes nothing."""
    pixels = torch.full((8, 8, 1), 0.5)
    peak = torch.zeros(4, 4)
    peak[0, 0] = 2.0
    figure = layercam_figure(pixels, [[peak, torch.zeros(2, 2)], [peak]], "a digit")
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert [picture.shape[:2] for picture in shown] == [(8, 8)] * 4
    flat, bright = shown[1], shown[3]  # level 1 stands above level 0
    assert flat.std((0, 1)).max() < 1e-12
    assert bright[0, 0].sum() > flat[0, 0].sum() + 0.5
    assert torch.allclose(torch.tensor(bright[-1, -1]), torch.tensor(flat[-1, -1]))


def test_layercam_figure_shows_no_rounding() -> None:
    """A map of one value, as of a top level of 1 x 1, has no maximum; enlarging it rounds some values."""
    pixels, value = torch.full((32, 32, 1), 0.5), torch.full((1, 1), 0.0123)
    enlarged = torch.nn.functional.interpolate(value[None, None], (32, 32), mode="bilinear")
    assert len(enlarged.unique()) > 1
    shown = layercam_figure(pixels, [[value]], "").axes[1].images[0].get_array()
    assert shown is not None
    assert shown.std((0, 1)).max() < 1e-12


@pytest.mark.parametrize("kind", ["bomb", "small bomb", "numbers", "pipe", "folder"])
def test_images_that_cannot_be_shown_are_reported_on_one_line(run: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "odd.png"
    if "bomb" in kind:
        path.write_bytes(bomb(10_000 if kind == "small bomb" else 20_000))
    elif kind == "numbers":
        Image.fromarray(torch.rand(8, 8).numpy()).save(path, "TIFF")
    else:
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with warnings.catch_warnings(action="error"), raises_error(code="unreadable-file", key="--image", names="odd.png"):
        call("layercam", run, "--image", path, "--png", tmp_path / "map.png")


def test_a_picture_of_16_bits_is_that_of_8(run: Path, tmp_path: Path) -> None:
    subject, _ = load_source(str(run))
    ramp = torch.arange(256).view(16, 16).numpy().astype("uint16")
    for name, picture in (("8.png", ramp.astype("uint8")), ("16.png", ramp * 256)):
        Image.fromarray(picture).save(tmp_path / name)
    found, wanted = (image_from(subject, tmp_path / name) for name in ("16.png", "8.png"))
    assert torch.equal(found, wanted)
    assert torch.equal(subject.transform(Image.open(tmp_path / "16.png")), wanted[0])
