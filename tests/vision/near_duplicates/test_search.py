"""`revnets duplicates` on planted near-duplicates, and on inputs that do not match."""

from __future__ import annotations

import io
import json
import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import typer
from PIL import Image
from rich.console import Console
from torch.testing import assert_close
from typer.testing import CliRunner

pytest.importorskip("imagehash")

from tests.support import image_folders
from tests.support.changed_pictures import CHANGES, picture
from tests.support.errors import raises_error
from tests.support.labeling import label, run_of, source, train
from vision.cli.duplicates import duplicates
from vision.data.key_lists import read_keys
from vision.labeling.local_engine import LabelSettings
from vision.labeling.origin import read_origin
from vision.labeling.teacher import load_teacher
from vision.near_duplicates import suspects
from vision.near_duplicates.contact_sheet import PAIRS, contact_sheet, shown
from vision.near_duplicates.features import TeacherFeatures, similar_features
from vision.near_duplicates.pictures import pictures_of
from vision.near_duplicates.search import search_duplicates
from vision.near_duplicates.suspects import Limits, Suspect
from vision.pseudo_labels.label_files import read_labels

SETTINGS = LabelSettings(0.01, 4, 7)
WIDE = Limits(distance=1.0, cosine=-1.0)
MODEL = {"timm": "test_revcol", "columns": 2, "patch_size": 4, "dims": [4, 8, 8, 16], "num_classes": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher; `web` with copies of images of `val`, and other images; labels of both."""
    folder = tmp_path_factory.mktemp("duplicates")
    image_folders.folder(folder / "insects")
    first = source(folder / "insects", head="insects", img_size=32)
    train(run_of(folder / "teacher", first, model=MODEL, heads={"insects": 3}, epochs=1))
    for name in ("web", "val"):
        (folder / name).mkdir()
    for number, change in enumerate(CHANGES.values()):
        original = picture(number)
        original.save(folder / "val" / f"{number}.png")
        change(original).save(folder / "web" / f"copy-{number}.png")
        picture(100 + number).save(folder / "web" / f"other-{number}.png")
    for name in ("web", "val"):
        label(folder / "teacher", folder / name, folder / f"{name}-labels", SETTINGS)
    return folder


COPIES = {f"copy-{number}.png": f"{number}.png" for number in range(len(CHANGES))}


def search(place, output, against="val-labels", labels="web-labels", limits=WIDE, **options):
    """The suspects, and what is printed."""
    console = Console(file=io.StringIO(), width=200)
    found = search_duplicates(
        place / labels, place / against, output, limits=limits, device="cpu", console=console, **options
    )
    return found, console.file.getvalue()  # type: ignore[attr-defined]


def pairs(found):
    return {suspect.key: suspect.against for suspect in found}


@pytest.mark.parametrize("against", ["val-labels", "val"])
def test_planted_copies_are_found_and_nothing_else(place, tmp_path, against):
    found, text = search(place, tmp_path / "suspects.parquet", against, png=tmp_path / "sheet.png")
    assert pairs(found) == COPIES
    assert [suspect.correlation for suspect in found] == sorted((s.correlation for s in found), reverse=True)
    assert all((suspect.cosine is not None) == (against == "val") for suspect in found)
    assert f"{len(CHANGES)} suspected" in text
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet.png", "suspects.parquet", "suspects.txt"]


def test_files_hold_the_pairs_and_lists_of_keys(place, tmp_path):
    found, _ = search(place, tmp_path / "suspects.parquet")
    rows = pq.read_table(tmp_path / "suspects.parquet").to_pylist()
    assert [(row["key"], row["against"], row["bits"]) for row in rows] == [
        (*suspect[:2], suspect.bits) for suspect in found
    ]
    assert_close([row["distance"] for row in rows], [suspect.distance for suspect in found])
    assert read_keys(str(tmp_path / "suspects.parquet")) == read_keys(str(tmp_path / "suspects.txt")) == set(COPIES)


def test_blocks_make_no_difference(place, tmp_path, monkeypatch):
    whole, _ = search(place, tmp_path / "suspects.parquet")
    for name in ("ROWS", "COMPARED", "PICTURES"):
        monkeypatch.setattr(suspects, name, 3)
    parts, _ = search(place, tmp_path / "suspects.parquet")
    assert [suspect[:4] for suspect in parts] == [suspect[:4] for suspect in whole]


def test_candidates_by_features(place, tmp_path):
    found, _ = search(place, tmp_path / "suspects.parquet", by="features")
    assert pairs(found) == COPIES


def test_duplicates_inside_of_a_set_count_once(place, tmp_path):
    shutil.copy(place / "web" / "other-0.png", place / "val" / "twin.png")
    shutil.copy(place / "web" / "other-0.png", place / "val" / "a.png")
    label(place / "teacher", place / "val", place / "twins", SETTINGS)
    found, _ = search(place, tmp_path / "suspects.parquet", "twins", "twins")
    assert pairs(found) == {"a.png": "twin.png"}
    for name in ("twin.png", "a.png"):
        (place / "val" / name).unlink()


def test_only_labels_are_compared_without_images(place, tmp_path):
    for name in ("web-labels", "val-labels"):
        shutil.copytree(place / name, tmp_path / name, ignore=shutil.ignore_patterns("sources.json"))
    found, text = search(tmp_path, tmp_path / "suspects.parquet", limits=Limits(distance=0.9, nearest=3))
    assert "--images" in text
    assert {suspect.correlation for suspect in found} == {None}
    assert max(suspect.distance for suspect in found) <= 0.9
    assert max(np.unique([suspect.key for suspect in found], return_counts=True)[1]) == 3
    with raises_error(code="missing-key", key="--png"):
        search(tmp_path, tmp_path / "suspects.parquet", png=tmp_path / "sheet.png")


def test_no_suspects_make_empty_files(place, tmp_path):
    found, _ = search(place, tmp_path / "suspects.parquet", limits=Limits(correlation=1.1), png=tmp_path / "s.png")
    assert found == []
    assert pq.read_table(tmp_path / "suspects.parquet").num_rows == 0
    assert read_keys(str(tmp_path / "suspects.txt")) == set()


def test_unreadable_images_are_reported_and_skipped(place, tmp_path):
    shutil.copytree(place / "web", tmp_path / "web")
    (tmp_path / "web" / "copy-1.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    found, text = search(place, tmp_path / "suspects.parquet", images=tmp_path / "web")
    assert set(pairs(found)) == set(COPIES) - {"copy-1.png"}
    assert "1 unreadable images" in text
    assert "copy-1.png" in text


def test_images_of_another_data_set_are_refused(place, tmp_path):
    with raises_error(code="misaligned-data", key="--images", names=str(place / "val")):
        search(place, tmp_path / "suspects.parquet", images=place / "val")
    with raises_error(code="missing-file", key="--images"):
        search(place, tmp_path / "suspects.parquet", images=tmp_path / "nothing")


def test_another_teacher_is_refused(place, tmp_path):
    image_folders.folder(tmp_path / "insects")
    first = source(tmp_path / "insects", head="insects", img_size=32)
    train(run_of(tmp_path / "other", first, model=MODEL, heads={"insects": 3}, epochs=1, seed=5))
    with raises_error(code="weights-mismatch", key="--teacher"):
        search(place, tmp_path / "suspects.parquet", teacher=str(tmp_path / "other"))
    label(tmp_path / "other", place / "val", tmp_path / "labels", SETTINGS)
    with raises_error(code="settings-differ", key="--against"):
        search(place, tmp_path / "suspects.parquet", against=tmp_path / "labels")


def test_images_to_compare_with_must_exist(place, tmp_path):
    (tmp_path / "empty").mkdir()
    with raises_error(code="missing-file", key="--against"):
        search(place, tmp_path / "suspects.parquet", against=tmp_path / "nothing")
    with raises_error(code="empty-data"):
        search(place, tmp_path / "suspects.parquet", against=tmp_path / "empty")
    with raises_error(code="missing-file"):
        search(place, tmp_path / "suspects.parquet", labels=tmp_path / "empty")
    shutil.copytree(place / "web-labels", tmp_path / "labels", ignore=shutil.ignore_patterns("sources.json"))
    with raises_error(code="missing-key", key="--teacher"):
        search(place, tmp_path / "suspects.parquet", "val", tmp_path / "labels")


def test_too_many_images_to_compare_with_are_refused(place, tmp_path, monkeypatch):
    monkeypatch.setattr(suspects, "MOST_AGAINST", 5)
    with raises_error(code="too-large", key="--against"):
        search(place, tmp_path / "suspects.parquet")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("", "damaged-file"),
        ("[" * 50_000, "damaged-file"),
        ('"x"' * 50_000, "damaged-file"),
        ("[]", "wrong-format"),
        ('{"teacher": 1, "data": "x"}', "wrong-format"),
        ('{"teacher": "x", "data": "a\\u0000b"}', "wrong-format"),
    ],
)
def test_an_origin_is_checked(tmp_path, content, code):
    (tmp_path / "sources.json").write_text(content)
    with raises_error(source=str(tmp_path / "sources.json"), code=code):
        read_origin(tmp_path)


def test_an_origin_holds_absolute_paths(place):
    origin = read_origin(place / "web-labels")
    assert origin is not None
    assert (origin.teacher, origin.data) == (str(place / "teacher"), str(place / "web"))
    assert json.loads((place / "web-labels" / "sources.json").read_text())["input_key"] is None


@pytest.mark.parametrize(
    ("option", "path", "code"),
    [
        ("--output", "suspects.csv", "unknown-suffix"),
        ("--png", "sheet.pdf", "unknown-suffix"),
        ("--output", "", "unknown-suffix"),
    ],
)
def test_output_paths_are_checked_first(tmp_path, option, path, code):
    app = typer.Typer()
    app.command()(duplicates)
    words = [str(tmp_path / "nothing"), "--against", str(tmp_path), option, path]
    with raises_error(code=code, key=option):
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_a_sheet_shows_the_least_certain_pairs(place):
    pictures = pictures_of(read_labels(place / "web-labels"), place / "web", "--images")
    many = [Suspect("other-1.png", "copy-1.png", 0.1, 3, 1 - number / 1000, 0.5) for number in range(200)]
    chosen = shown(many)
    assert len(chosen) == len(set(chosen)) == PAIRS
    assert set(many[-PAIRS // 2 :]) <= set(chosen)
    sheet = np.asarray(contact_sheet(many[:1], pictures, pictures))
    empty = np.asarray(contact_sheet([Suspect("gone.png", "gone.png", 0.1)], pictures, pictures))
    assert sheet.shape == empty.shape
    assert (sheet != 255).sum() > 2 * (empty != 255).sum()


@pytest.mark.parametrize("with_faiss", [True, False])
def test_the_nearest_features(monkeypatch, with_faiss):
    if with_faiss:
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr("vision.near_duplicates.features.BLOCK", 40)
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.nn.functional.normalize(torch.randn(rows, 5, generator=generator)) for rows in (11, 13))
    blocks = [*similar_features(one.numpy(), other.numpy(), 3)]
    assert len(blocks) == 4
    rows, columns, values = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    wanted = (one @ other.T).sort(descending=True)
    assert np.array_equal(rows, np.repeat(np.arange(11), 3))
    assert np.array_equal(columns.reshape(11, 3), wanted.indices[:, :3].numpy())
    assert_close(torch.from_numpy(values).view(11, 3), wanted.values[:, :3])


def test_features_are_the_mirror_invariant_input_of_the_classifier(place):
    teacher = load_teacher(str(place / "teacher"), "cpu")
    features = TeacherFeatures(teacher)
    one = picture(3).convert("RGB")
    mirrored = one.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    found = features([one, mirrored])
    assert_close(found[0], found[1], atol=2e-3, rtol=0)  # resized images are mirrored but for rounding
    assert_close(found.norm(dim=1), torch.ones(2))
    assert found.shape == (2, teacher.model.get_classifier().in_features)
