"""`revnets label` in one process and in several, interrupted anywhere: the same files, bit for bit."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from revnets.utils.file_lock import try_lock
from tests.support import image_folders
from tests.support.errors import raises_error
from tests.support.labeled_images import images, labels, teacher  # noqa: F401  (fixtures)
from tests.support.labeling import SETTINGS, contents, ended, label, start
from vision import load_run
from vision.labeling import work_queue
from vision.labeling.local_engine import LabelSettings
from vision.labeling.shards import Shard, list_shards
from vision.labeling.teacher import load_teacher
from vision.pseudo_labels.label_files import part_path, read_labels
from vision.pseudo_labels.targets import listing_digest


def test_rows_are_the_mean_of_both_views_without_improbable_classes(teacher, images, labels):  # noqa: F811
    run = load_run(teacher, overrides=["device=cpu"])
    found = read_labels(labels)
    assert found.heads == {"insects": 3, "eyes": 2}
    rows = [(key, batch, row) for batch in found.batches(3) for row, key in enumerate(batch.keys)]
    keys = {str(path.relative_to(images)) for path in images.rglob("*.jpg")}
    assert [key for key, *_ in rows] == sorted(keys - {"ant/6.jpg"})
    assert found.unreadable == {"ant/6.jpg"}
    for key, batch, row in rows[::5]:
        with Image.open(images / key) as picture:
            pixels = run.transform(picture)[None]
        with torch.no_grad():
            views = [run.model(view).split([3, 2], 1) for view in (pixels, pixels.flip(-1))]
        for head, one, other in zip(("insects", "eyes"), *views, strict=True):
            wanted = (one.softmax(1) + other.softmax(1))[0] / 2
            assert wanted.min() > 0.01
            assert_close(batch.heads[head].row(row, len(wanted)), wanted, atol=1e-3, rtol=1e-3)


def test_a_minimum_drops_classes_and_keeps_their_sum(teacher, images, tmp_path):  # noqa: F811
    label(teacher, images, tmp_path, LabelSettings(0.34, 4, 50))
    sparse = next(read_labels(tmp_path).batches(50)).heads["insects"]
    assert 0 < len(sparse.classes) < 3 * len(sparse)
    assert sparse.probabilities.min() >= 0.339
    assert_close(sparse.row(1, 3).sum(), torch.ones(()), atol=2e-3, rtol=0)


def test_metadata_name_teacher_data_and_settings(teacher, images, labels):  # noqa: F811
    keys = [str(path.relative_to(images)) for path in images.rglob("*.jpg")]
    provenance = read_labels(labels).provenance
    assert (provenance.data, provenance.parts, provenance.round) == (listing_digest(keys), 5, 1)
    assert provenance.settings["preparation"]["img_size"] == 16
    assert provenance.settings["min_probability"] == 0.01


def test_a_second_call_has_nothing_to_do(teacher, images, labels):  # noqa: F811
    before = contents(labels)
    assert "23 images in 5 shards, 23 of them labeled" in label(teacher, images, labels)
    assert contents(labels) == before


@pytest.mark.parametrize("kill_at", [2, 5, 13])
def test_labeling_killed_at_a_file_operation_is_resumed(teacher, images, labels, tmp_path, kill_at):  # noqa: F811
    folder = tmp_path / "labels"
    folder.mkdir()
    assert ended(start(teacher, images, folder, kill_at)) == -signal.SIGKILL
    assert len(list(folder.glob("part-*.parquet"))) < 5
    assert ended(start(teacher, images, folder)) == 0
    assert contents(folder) == contents(labels)


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_share_the_work_and_one_of_them_is_killed(teacher, images, labels, tmp_path, size):  # noqa: F811
    folder = tmp_path / "labels"
    folder.mkdir()
    children = [start(teacher, images, folder, 4 * (rank == 0), rank, size) for rank in range(size)]
    assert [ended(child) for child in children[1:]] == [0] * (size - 1)
    assert ended(children[0]) in (-signal.SIGKILL, 0)
    assert contents(folder) == contents(labels)


def test_a_claim_of_a_live_process_is_respected(teacher, images, labels, tmp_path, monkeypatch):  # noqa: F811
    """While it sleeps, the other process finishes its shard."""
    folder = tmp_path / "labels"
    found = list_shards(images, SETTINGS.shard_size)
    folder.mkdir()
    queue = work_queue.WorkQueue(folder, found.shards, read_labels(labels).provenance)
    claims = queue.claims()
    claimed = next(claims)
    waited = []

    def finish(_: float) -> None:
        waited.append(sorted(path.name for path in folder.glob("part-*")))
        name = f"part-{claimed.number:05d}.parquet"
        (folder / name).write_bytes((labels / name).read_bytes())

    monkeypatch.setattr(work_queue.time, "sleep", finish)
    label(teacher, images, folder)
    claims.close()
    others = {path.name for path in labels.glob("part-*")} - {f"part-{claimed.number:05d}.parquet"}
    assert waited == [sorted(others)]
    assert contents(folder) == contents(labels)


def test_a_lock_without_an_owner_is_waited_for(images, labels, tmp_path, monkeypatch):  # noqa: F811
    """Like the lock of a process that has just created the file."""
    found = list_shards(images, SETTINGS.shard_size)
    queue = work_queue.WorkQueue(tmp_path, found.shards, read_labels(labels).provenance)
    for name, content in list(contents(labels).items())[1:]:
        (tmp_path / name).write_bytes(content)
    waited, owners = [], []

    def finish(seconds: float) -> None:
        waited.append(seconds)
        (tmp_path / "part-00000.parquet").write_bytes((labels / "part-00000.parquet").read_bytes())

    monkeypatch.setattr(work_queue.time, "sleep", finish)
    with open(tmp_path / ".part-00000.lock", "wb") as file:
        assert try_lock(file.fileno())
        assert list(queue.claims(wait=owners.append)) == []
    assert (waited, owners) == ([work_queue.PAUSE], ["another process"])


def test_remaining_shards_need_one_listing(images, labels, tmp_path, monkeypatch):  # noqa: F811
    shards = tuple(Shard(number, (number,)) for number in range(503))
    queue = work_queue.WorkQueue(tmp_path, shards, replace(read_labels(labels).provenance, parts=503))
    looks, listdir, exists = [], os.listdir, Path.exists
    monkeypatch.setattr(os, "listdir", lambda path: looks.append(path) or listdir(path))
    monkeypatch.setattr(Path, "exists", lambda path: looks.append(path) or exists(path))
    assert queue.images_waiting() == 503
    assert looks == [tmp_path]


def test_a_file_with_the_name_of_another_part_is_refused_while_labeling(images, labels, tmp_path):  # noqa: F811
    found = list_shards(images, SETTINGS.shard_size)
    queue = work_queue.WorkQueue(tmp_path, found.shards, read_labels(labels).provenance)
    (tmp_path / "part-00000.parquet").write_bytes((labels / "part-00001.parquet").read_bytes())
    for look in (queue.waiting, lambda: next(queue.claims())):
        with raises_error(code="name-clash", source=tmp_path / "part-00000.parquet", names="part-00001.parquet"):
            look()


def test_more_shards_than_a_set_may_have_are_refused(images, monkeypatch):  # noqa: F811
    monkeypatch.setattr("vision.labeling.shards.MAX_PARTS", 4)
    with raises_error(code="too-large", key="--shard-size", names=["5 shards", "4"]):
        list_shards(images, SETTINGS.shard_size)


def test_tars_are_shards_with_keys_of_their_own(teacher, tmp_path):  # noqa: F811
    image_folders.shards(tmp_path / "all", count=3, each=4)
    (tmp_path / "train").mkdir()
    for path in (tmp_path / "all").glob("train-*.tar"):
        path.rename(tmp_path / "train" / path.name)
    label(teacher, tmp_path / "train", tmp_path / "labels")
    found = read_labels(tmp_path / "labels")
    assert [file.rows for file in found.files] == [4, 4, 4]
    keys = [key for batch in found.batches() for key in batch.keys]
    assert keys == [f"train-{shard}.tar/{shard}_{number}.jpg" for shard in range(3) for number in range(4)]


def test_labels_of_other_settings_or_data_are_refused(teacher, images, labels, tmp_path):  # noqa: F811
    before = contents(labels)
    for changed, name in (
        (LabelSettings(batch_size=8, shard_size=5), "batch_size"),
        (LabelSettings(batch_size=4, shard_size=5, round=2), "round"),
        (LabelSettings(0.05, 4, 5), "min_probability"),
    ):
        with raises_error(code="settings-differ", key="--output", names=[name, "part-00000.parquet"]):
            label(teacher, images, labels, changed)
    with raises_error(code="settings-differ", key="--output", names="data"):
        label(teacher, images / "ant", labels)
    assert contents(labels) == before


def test_a_half_written_file_is_named(teacher, images, labels, tmp_path):  # noqa: F811
    for name, content in contents(labels).items():
        (tmp_path / name).write_bytes(content[: len(content) // 2] if name == "part-00002.parquet" else content)
    with raises_error(code="damaged-file", source=tmp_path / "part-00002.parquet"):
        label(teacher, images, tmp_path)


def test_an_exchanged_file_of_the_right_shape_is_named(teacher, images, labels, tmp_path):  # noqa: F811
    for name, content in contents(labels).items():
        (tmp_path / name).write_bytes(content)
    path = part_path(tmp_path, 2)
    table = pq.read_table(path)
    flipped = table.take([0, *range(2, len(table)), 1]).drop(["key"]).add_column(0, "key", table["key"])
    pq.write_table(flipped.replace_schema_metadata(table.schema.metadata), path)
    with raises_error(code="damaged-file", source=path, names="digest"):
        label(teacher, images, tmp_path)


def test_without_space_finished_files_are_kept(teacher, images, labels, tmp_path, monkeypatch):  # noqa: F811
    """The third file cannot be written to the disk; the next call resumes with it."""
    syncs, original = iter(range(1, 100)), os.fsync

    def full(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith(".partial") and next(syncs) == 3:
            raise OSError(28, os.strerror(28))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        label(teacher, images, tmp_path)
    assert caught.value.filename == str(tmp_path / "part-00002.parquet")
    assert contents(tmp_path) == dict(list(contents(labels).items())[:2])
    label(teacher, images, tmp_path)
    assert contents(tmp_path) == contents(labels)


def test_bad_data_and_teachers_are_reported_on_one_line(teacher, images, tmp_path):  # noqa: F811
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice").mkdir()
    image_folders.tars(tmp_path / "tars")
    os.link(tmp_path / "tars/train.tar", tmp_path / "twice/a.tar")
    os.link(tmp_path / "tars/train.tar", tmp_path / "twice/b.tar")
    for data, code, name in (
        (tmp_path / "none", "missing-file", "none"),
        (tmp_path / "empty", "empty-data", "empty"),
        (tmp_path / "twice", "name-clash", "b.tar"),
    ):
        with raises_error(code=code, key="DATA", names=name):
            label(teacher, data, tmp_path / "labels")
    with raises_error(code="missing-file", key="TEACHER", names="no_such_model"):
        label("no_such_model", images, tmp_path / "labels")  # type: ignore[arg-type]


def test_a_teacher_whose_scores_are_not_finite_is_refused(teacher):  # noqa: F811
    loaded = load_teacher(str(teacher), "cpu")
    with torch.no_grad():
        next(loaded.model.head.parameters()).fill_(torch.nan)
    with raises_error(code="loss-not-finite", source=teacher):
        loaded.probabilities(torch.zeros(2, 3, 16, 16))
