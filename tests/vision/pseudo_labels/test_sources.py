"""Images of several sources with classes, soft labels or both, by their keys."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.testing import assert_close

from tests.support import image_folders
from tests.support.errors import raises_error
from tests.support.labeling import HEADS, run_of, source, train, two_sources
from vision.config.run import load_config
from vision.data.samplers import Key
from vision.distributed.context import World
from vision.errors import DataError
from vision.pseudo_labels import labeled_source
from vision.pseudo_labels.label_files import Provenance, part_path, read_labels, write_part
from vision.pseudo_labels.label_lookup import LabelLookup, sample_key
from vision.pseudo_labels.sparse import joined_rows, largest
from vision.pseudo_labels.targets import HeadTargets, listing_digest
from vision.tasks import create_task


def labeled(folder, keys, missing=(), heads=HEADS, digest=None, cuts=2, teacher="t"):
    """Labels of images: the same probabilities for every head, which depend on the number of the image."""
    folder.mkdir()
    names = sorted(keys)
    pieces = [list(piece) for piece in np.array_split(names, cuts)]
    set_of = Provenance(teacher, digest or listing_digest(keys), {}, heads, cuts)
    for part, piece in enumerate(pieces):
        kept = [key for key in piece if key not in missing]
        rows = {head: [probabilities(names.index(key), count) for key in kept] for head, count in heads.items()}
        soft = {head: largest(torch.stack(found), 0.2) if found else joined_rows([]) for head, found in rows.items()}
        write_part(part_path(folder, part), set_of, part, kept, soft, [key for key in piece if key in missing])
    return folder


def probabilities(number: int, count: int) -> torch.Tensor:
    values = torch.arange(count) + 1.0 + number
    return values.roll(number) / values.sum()


def keys_of(root):
    return [str(path.relative_to(root)) for path in root.rglob("*.jpg")]


def data_of(output, *sources, **changes):
    return create_task(load_config(run_of(output, *sources, **changes))).load_data()


def training_data(output, *sources, **changes):
    """The same as a trainer has it, with all checks."""
    return create_task(load_config(run_of(output, *sources, **changes))).load_data(world=World())


@pytest.fixture
def web(tmp_path):
    """Images without classes, inside and outside of directories."""
    root = image_folders.folder(tmp_path / "all", train=4) / "train"
    (root / "z.jpg").write_bytes(image_folders.jpeg(1, 9))
    return root


def test_targets_are_classes_soft_labels_or_nothing():
    targets = HeadTargets(HEADS, smoothing=0.3)
    soft = {"eyes": largest(torch.tensor([[0.9, 0.1]]), 0.01)}
    assert_close(targets.target("insects", 1), torch.tensor([0.1, 0.8, 0.1, 0, 0]))
    assert_close(targets.target(None, -1, soft, 0), torch.tensor([0, 0, 0, 0.9, 0.1]), atol=1e-3, rtol=0)
    assert_close(targets.target("insects", 2, soft, 0), torch.tensor([0.1, 0.1, 0.8, 0.9, 0.1]), atol=1e-3, rtol=0)
    assert_close(targets.target("eyes", 1, soft, 0), torch.tensor([0, 0, 0, 0.15, 0.85]))
    assert_close(targets.target(None, -1, soft, -1), torch.zeros(5))


def test_labels_are_joined_by_key(tmp_path, web):
    folder = labeled(tmp_path / "labels", keys_of(web))
    data = data_of(tmp_path / "run", *two_sources(tmp_path), source(web, labels=str(folder)))
    images = data.train.sets[2]
    assert len(images) == 13
    names = sorted(keys_of(web))
    for index in range(13):
        key = names.index(images.images.reader.filename(index))
        target = images[Key(0, index)][1]
        for part, count in ((target[:3], 3), (target[3:], 2)):
            wanted = probabilities(key, count)
            stored = wanted > 0.2
            assert_close(part[stored], wanted[stored], atol=1e-3, rtol=1e-3)
            assert_close(part.sum(), torch.ones(()), atol=2e-3, rtol=0)


def test_the_whole_set_has_the_classes_of_both_heads(tmp_path):
    data = data_of(tmp_path / "run", *two_sources(tmp_path))
    assert data.classes == ("insects/ant", "insects/bee", "insects/cat", "eyes/ant", "eyes/bee")
    assert (len(data.train), len(data.val)) == (24 + 10, 9 + 4)
    classes = torch.stack([data.val[index][1] for index in range(13)])
    assert classes[:9].tolist() == [[number, -1] for number in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
    assert classes[9:].tolist() == [[-1, 0], [-1, 0], [-1, 1], [-1, 1]]


def test_images_that_the_teacher_could_not_read_are_omitted(tmp_path, web):
    folder = labeled(tmp_path / "labels", keys_of(web), missing=["ant/1.jpg", "z.jpg"])
    data = data_of(tmp_path / "run", *two_sources(tmp_path), source(web, labels=str(folder)))
    assert len(data.train.sets[2]) == 11
    assert "2 images" in data.remarks[-1]


def test_excluded_images_are_omitted(tmp_path, web):
    folder = labeled(tmp_path / "labels", keys_of(web))
    (tmp_path / "list.txt").write_text("ant/1.jpg\r\nbee/0.jpg\n\nno/such.jpg\n")
    pq.write_table(pa.table({"key": ["cat/3.jpg"], "score": [0.5]}), tmp_path / "list.parquet")
    for name, lost in (("list.txt", {"ant/1.jpg", "bee/0.jpg"}), ("list.parquet", {"cat/3.jpg"})):
        entry = source(web, labels=str(folder), exclude=str(tmp_path / name))
        sources = [{**one, "exclude": None} for one in two_sources(tmp_path / name[-3:])]
        reader = data_of(tmp_path / "run", *sources, entry).train.sets[2].images.reader
        assert {reader.filename(index) for index in range(len(reader))} == set(keys_of(web)) - lost


def test_a_run_with_one_set_of_classes_excludes_images_too(tmp_path):
    image_folders.folder(tmp_path / "data")
    (tmp_path / "list.txt").write_text("ant/1.jpg\nbee/0.jpg\nno.jpg\n")
    entry = source(tmp_path / "data", exclude=str(tmp_path / "list.txt"))
    config = {**run_of(tmp_path / "run"), "heads": None, "data": entry}
    data = create_task(load_config(config)).load_data()
    assert (len(data.train), len(data.val)) == (22, 9)
    assert "2 training images; 1 of its keys match no image" in data.remarks[-1]


@pytest.mark.parametrize(
    ("content", "code"), [(b"\xff\n", "invalid-encoding"), (None, "missing-file"), (b"all", "empty-data")]
)
def test_lists_that_cannot_be_used_are_named(tmp_path, content, code):
    image_folders.folder(tmp_path / "data", train=1, val=1)
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes("\n".join(keys_of(tmp_path / "data/train")).encode() if content == b"all" else content)
    config = {**run_of(tmp_path / "run"), "heads": None, "data": source(tmp_path / "data", exclude=str(path))}
    with raises_error(code=code, key="data.exclude"):
        create_task(load_config(config)).load_data()


def test_a_run_does_not_resume_with_labels_of_another_teacher(tmp_path, web):
    sources = two_sources(tmp_path)
    own, others = (labeled(tmp_path / teacher, keys_of(web), teacher=teacher) for teacher in ("own", "others"))
    moved = shutil.copytree(own, tmp_path / "moved")
    train(run_of(tmp_path / "run", *sources, source(web, labels=str(own)), epochs=1))
    train(run_of(tmp_path / "run", *sources, source(web, labels=str(moved)), epochs=2))
    with raises_error(code="settings-differ", key="data.2.labels", names=["teacher", "own", "others"]):
        train(run_of(tmp_path / "run", *sources, source(web, labels=str(others)), epochs=3))


def test_labels_that_do_not_fit_are_named(tmp_path, web):
    sources, keys = two_sources(tmp_path), keys_of(web)
    for name, folder, code in (
        ("other images", labeled(tmp_path / "a", keys, digest="d" * 64), "misaligned-data"),
        ("other heads", labeled(tmp_path / "b", keys, heads={"plants": 3}), "class-mismatch"),
        ("other counts", labeled(tmp_path / "c", keys, heads={"eyes": 3}), "class-mismatch"),
        ("too few", labeled(tmp_path / "d", keys[:-1], digest=listing_digest(keys)), "misaligned-data"),
    ):
        with raises_error(code=code, key="data.2.labels", names=str(folder)):
            data_of(tmp_path / name, *sources, source(web, labels=str(folder)))


def test_classes_that_do_not_fit_are_named(tmp_path, web):
    sources = two_sources(tmp_path)
    with raises_error(code="class-mismatch", key="data.1.head", names=["2 classes", "insects"]):
        data_of(tmp_path / "run", {**sources[1], "head": "eyes"}, {**sources[1], "head": "insects"})
    with raises_error(code="missing-file", key="data.2.root"):
        data_of(tmp_path / "run", *sources, source(tmp_path / "no", labels="labels"))
    folder = labeled(tmp_path / "labels", keys_of(web))
    with raises_error(code="empty-data", key="data"):
        data_of(tmp_path / "run", source(web, labels=str(folder)))


def test_a_source_without_an_image_is_named(tmp_path, web):
    folder = labeled(tmp_path / "labels", keys_of(web), missing=keys_of(web))
    sources = [{**one, "weight": 1.0} for one in two_sources(tmp_path)]
    with raises_error(code="empty-data", key="data.2.labels"):
        data_of(tmp_path / "run", *sources, source(web, labels=str(folder), weight=1.0))


def test_a_source_without_a_share_of_an_epoch_is_named(tmp_path):
    sources = [one | {"weight": weight} for one, weight in zip(two_sources(tmp_path), (1.0, 1e-6), strict=True)]
    with raises_error(code="out-of-range", key="data.1.weight"):
        training_data(tmp_path / "run", *sources)
    assert len(data_of(tmp_path / "run", *sources).val) == 13  # an evaluation needs no training set


def test_a_head_without_labels_is_named(tmp_path, web):
    entry, folder = two_sources(tmp_path)[0], labeled(tmp_path / "labels", keys_of(web), heads={"insects": 3})
    for number, sources in enumerate(([entry], [entry, source(web, labels=str(folder))])):
        with raises_error(code="class-mismatch", key="heads.eyes"):
            training_data(tmp_path / f"run-{number}", *sources)
        assert len(data_of(tmp_path / f"run-{number}", *sources).val) == 9


@pytest.mark.parametrize(("key", "code"), [("exclude", "missing-file"), ("root", "missing-file")])
def test_errors_name_the_number_of_a_source(tmp_path, key, code):
    first, second = two_sources(tmp_path)
    with raises_error(code=code, key=f"data.1.{key}"):
        data_of(tmp_path / "run", first, second | {key: str(tmp_path / "none")})


def stream_of(root, **changes):
    return {"name": "wds", "root": str(root), "img_size": 16, "num_classes": 3, **changes}


@pytest.fixture
def shards(tmp_path):
    pytest.importorskip("webdataset")
    root = image_folders.shards(tmp_path / "shards", count=2, each=6)
    keys = [f"train-{shard}.tar/{shard}_{number}.jpg" for shard in range(2) for number in range(6)]
    return root, labeled(tmp_path / "labels", keys)


def test_streams_find_their_labels(tmp_path, shards):
    root, folder = shards
    (tmp_path / "list.txt").write_text("train-0.tar/0_2.jpg\n")
    entry = stream_of(root, head="insects", labels=str(folder), exclude=str(tmp_path / "list.txt"))
    data = data_of(tmp_path / "run", entry)
    targets = torch.stack([target for _, target in data.train])
    assert len(targets) == len(data.train) == 12
    wanted = torch.stack([probabilities(number, 2) for number in range(12) if number != 2])
    soft = (wanted.max(1, keepdim=True).values == wanted) | (wanted > 0.2)
    assert soft.all()  # no probability of two classes is omitted
    near = (targets[:, None, 3:] - wanted).abs().amax(2) < 2e-3
    assert near.any(1).all()
    assert near.any(0).all()
    classes = [number % 3 for number in range(12) if number != 2]
    assert targets[:, :3].argmax(1).tolist() == [classes[row] for row in near.int().argmax(1).tolist()]
    assert [target.tolist() for _, target in data.val] == [[number % 3, -1] for number in range(6)]


def test_two_streams_are_mixed_by_weight(tmp_path, shards):
    root, folder = shards
    own, soft = stream_of(root, head="insects", weight=1.0), stream_of(root, labels=str(folder), weight=3.0)
    train = data_of(tmp_path / "run", own, soft).train
    train.epoch = 2
    targets = torch.stack([target for _, target in train])
    assert torch.equal(torch.stack([target for _, target in train]), targets)
    has_class = targets[:, 3:].sum(1) == 0
    assert len(train) == len(targets) == 24
    assert 0 < has_class.sum() < 12


def test_a_sample_without_label_stops_a_stream(tmp_path, shards):
    root, folder = shards
    part_path(folder, 0).unlink()
    part_path(folder, 1).unlink()
    other = labeled(tmp_path / "other", [f"train-{shard}.tar/{shard}_0.jpg" for shard in range(2)])
    data = data_of(tmp_path / "run", stream_of(root, head="insects", labels=str(other)))
    with pytest.raises(DataError, match=r"train-\d.tar/\d_\d"):
        list(data.train)


def classes_of(stream):
    return sorted(int(target[:3].argmax()) for _, target in stream)


def test_a_class_map_numbers_the_classes_of_a_stream(tmp_path):
    pytest.importorskip("webdataset")
    root = image_folders.shards(tmp_path / "shards", count=2, each=1)  # both of class 0
    (tmp_path / "map.pkl").write_bytes(pickle.dumps({0: 2, 1: 1, 2: 0}))
    plain = data_of(tmp_path / "run", stream_of(root, head="insects"))
    mapped = data_of(tmp_path / "run", stream_of(root, head="insects", class_map=str(tmp_path / "map.pkl")))
    assert (classes_of(plain.train), classes_of(mapped.train)) == ([0, 0], [2, 2])
    assert [target.tolist() for _, target in mapped.val] == [[2, -1]]


def test_every_worker_needs_a_shard_of_each_stream(tmp_path, shards):
    root, folder = shards
    sources = stream_of(root, head="insects"), stream_of(root, labels=str(folder))
    assert len(training_data(tmp_path / "run", *sources, workers=2).train) == 24
    with raises_error(code="too-few-samples", key="data.0.root"):
        training_data(tmp_path / "run", *sources, workers=3)


def test_a_stream_without_samples_leaves_its_share_to_others(tmp_path, shards):
    root, folder = shards
    names = tmp_path / "list.txt"
    names.write_text("".join(f"train-{shard}.tar/{shard}_{number}.jpg\n" for shard in range(2) for number in range(6)))
    own, none = stream_of(root, head="insects"), stream_of(root, labels=str(folder), exclude=str(names))
    targets = [target for _, target in data_of(tmp_path / "run", own, none).train]
    assert len(targets) == 24
    assert not torch.stack(targets)[:, 3:].any()
    with pytest.raises(DataError, match="shards"):
        next(iter(data_of(tmp_path / "run", own | {"exclude": str(names)}, none).train))


def test_streams_are_compared_with_labels_and_lists(tmp_path, shards):
    root, folder = shards
    few = labeled(tmp_path / "few", ["train-0.tar/0_0.jpg"], cuts=1)
    with raises_error(code="misaligned-data", key="data.0.labels", names="train-1.tar"):
        data_of(tmp_path / "run", stream_of(root, head="insects", labels=str(few)))
    for content, is_refused in (("0_0.jpg\n", True), ("train-0.tar/0_0.jpg\nval-0.tar/0_0.jpg\n", False)):
        (tmp_path / "list.txt").write_text(content)
        entry = stream_of(root, head="insects", exclude=str(tmp_path / "list.txt"))
        if is_refused:
            with raises_error(code="misaligned-data", key="data.0.exclude"):
                data_of(tmp_path / "run", entry)
        else:
            assert "val-0.tar/0_0.jpg" in data_of(tmp_path / "run", entry).remarks[-1]
    entry = stream_of(root, head="insects", labels=str(folder), train_split="train-0.tar", train_samples=6)
    assert "train-1.tar" in data_of(tmp_path / "run", entry).remarks[-1]


def test_keys_without_a_sample_in_their_tar_are_counted(tmp_path, shards, monkeypatch):
    root, _ = shards
    names = ("train-0.tar/0_2.jpg", "train-0.tar/9_9.jpg", "train-0.tar/0_2/0_2.jpg", "train-1.tar/7.jpg")
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in names))
    entry = stream_of(root, head="insects", exclude=str(tmp_path / "list.txt"))
    assert data_of(tmp_path / "run", entry).remarks[-1].endswith("list.txt: 3 keys match no sample of their tar")
    monkeypatch.setattr(labeled_source, "MAX_LISTED_TARS", 1)
    remark = data_of(tmp_path / "run", entry).remarks[-1]
    assert remark.endswith("list.txt: 2 keys match no sample of their tar (of 1 tars checked, out of 2)")
    (tmp_path / "list.txt").write_text(f"{names[0]}\n")
    assert not data_of(tmp_path / "run", entry).remarks


READERS = {"folder": True, "tar": True, "wds": True, "hfds/x": False, "hfids/x": False, "idx": False}
"""Readers, and whether their images have keys."""


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("key", ["labels", "exclude"])
def test_readers_without_keys_refuse_labels_and_lists(name, key):
    entry = {"name": name, "root": "data", "head": "insects", key: "somewhere"}
    if READERS[name]:
        assert getattr(load_config(run_of("run", entry)).data.sources[0], key) == "somewhere"
        return
    data = entry if name == "idx" else [entry]
    code, place = ("unknown-key", "data") if name == "idx" else ("conflicting-values", "data.0")
    del entry["head"]
    if key == "exclude" and name != "idx":
        entry["head"] = "insects"
    with raises_error(code=code, key=f"{place}.{key}"):
        load_config({**run_of("run"), "data": data})


@pytest.mark.parametrize(("name", "code"), [("wds", "missing-key"), ("hfids/x", "conflicting-values")])
def test_lists_of_streams_without_heads_are_refused(name, code):
    entry = {"name": name, "root": "data", "exclude": "list.txt"}
    with raises_error(code=code, key="data.exclude", names=name):
        load_config({**run_of("run"), "heads": None, "data": entry})


def test_a_reader_without_keys_is_refused_in_a_run_with_heads():
    with raises_error(code="conflicting-values", key="data.0.name", names="hfds/x"):
        load_config(run_of("run", {"name": "hfds/x", "head": "insects"}))


def test_two_labeled_images_of_a_sample_are_refused(tmp_path):
    folder = labeled(tmp_path / "labels", ["a.tar/x.jpg", "a.tar/x.seg.png"], cuts=1)
    lookup = LabelLookup(read_labels(folder), ["eyes"])
    with pytest.raises(DataError, match=r"part-00000.parquet: .* a\.tar/x has"):
        lookup("a.tar/x")


@pytest.mark.parametrize(
    ("key", "sample"), [("a.tar/x.jpg", "a.tar/x"), ("a.b.tar/c.d/x.seg.png", "a.b.tar/c.d/x"), ("a.tar/x", "a.tar/x")]
)
def test_keys_of_samples_have_no_suffixes(key, sample):
    assert sample_key(key) == sample
