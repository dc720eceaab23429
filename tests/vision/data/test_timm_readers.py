"""Directories, tars, Hugging Face data sets and webdataset, and the errors for wrong data."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tarfile

import pytest
import torch
from timm.data import auto_augment

from tests.support import image_folders as images
from tests.support.errors import raises_error
from tests.support.training_processes import console_output, process, together
from tests.support.training_runs import assert_same
from vision.checkpoints import reader
from vision.config.run import load_config
from vision.data.dataset import load_data
from vision.data.samplers import Key, TrainBatches, seeded, val_loader
from vision.data.transforms import posterize, train_transform
from vision.distributed.context import World
from vision.errors import DataError
from vision.training.run_log import LOG, read_log

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything of Hugging Face is imported: nothing is fetched here

AUGMENT = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5}


def settings(name, root, output="x", augment=AUGMENT, data=(), **changes):
    """A run of a toy RevCol on these data."""
    return {
        "model": {"timm": "test_revcol", "dims": [4, 4, 4, 4], "depths": [1, 1, 1, 1], "columns": 2},
        "output": str(output),
        "data": {"name": name, "root": str(root), "img_size": 32, "augment": augment, **dict(data)},
        "batch_size": 4,
        "epochs": 1,
        **changes,
    }


def open_data(run, notes=None, world=None):
    config = load_config(run)
    data = load_data(config.data, config.seed, notes, world)
    return data, TrainBatches(config, data, world), val_loader(config, data, world)


def batches(run, epoch=0, start=0, **options):
    return list(open_data(run, **options)[1].epoch(epoch, start))


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return images.folder(tmp_path_factory.mktemp("folder"))


def test_folder(root):
    data, train, val = open_data(settings("folder", root))
    assert (data.classes, data.shape, len(data.train), len(data.val), train.updates) == (
        images.CLASSES,
        (3, 32, 32),
        24,
        9,
        6,
    )
    seen = list(train.epoch(0))
    assert sorted(torch.cat([labels for _, labels in seen]).tolist()) == [0] * 8 + [1] * 8 + [2] * 8
    assert all(x.shape == (4, 3, 32, 32) and x.dtype == torch.float32 for x, _ in seen)
    pictures, labels = (torch.cat(parts) for parts in zip(*val, strict=True))
    brightness = torch.stack([pictures[labels == label].mean() for label in range(3)])
    assert (brightness.diff() > 0.3).all()  # the images are those of their classes
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_augmentation_is_a_function_of_seed_epoch_and_index(root):
    reference = batches(settings("folder", root), epoch=3)
    assert same(batches(settings("folder", root, workers=2), epoch=3), reference)
    assert same(batches(settings("folder", root), epoch=3, start=4), reference[4:])
    for other in (batches(settings("folder", root), epoch=4), batches(settings("folder", root, seed=1), epoch=3)):
        assert not any(torch.equal(a[0], b[0]) for a, b in zip(reference, other, strict=True))
    train = open_data(settings("folder", root))[0].train
    state = torch.get_rng_state()
    first, again, later = (train[Key(epoch, 5)][0] for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert torch.equal(torch.get_rng_state(), state)


def test_tar_has_the_images_of_the_folder(root, tmp_path):
    tars = images.tars(tmp_path)
    assert same(batches(settings("tar", tars, workers=2)), batches(settings("folder", root)))


def test_a_missing_class_of_the_validation_set_moves_no_label(tmp_path):
    images.folder(tmp_path)
    shutil.rmtree(tmp_path / "val" / "ant")
    _, _, val = open_data(settings("folder", tmp_path))
    assert torch.cat([labels for _, labels in val]).tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("name", ["hfds", "hfids"])
def test_hugging_face_data_set(root, tmp_path, name):
    pytest.importorskip("datasets")
    counts = {"train_samples": 24, "val_samples": 9, "num_classes": 3} if name == "hfids" else {}  # not known yet
    run = settings(f"{name}/{root}", tmp_path / "cache", data=counts)
    data, train, val = open_data(run)
    assert data.classes == (("0", "1", "2") if counts else images.CLASSES)
    assert (len(data.train), len(data.val), train.updates) == (24, 9, 6)
    seen = list(train.epoch(1))
    assert sorted(torch.cat([labels for _, labels in seen]).tolist()) == [0] * 8 + [1] * 8 + [2] * 8
    assert same(batches(run, epoch=1, start=2), seen[2:])
    assert not same(list(train.epoch(2)), seen)
    assert same(list(train.epoch(1)), seen)
    assert sorted(torch.cat([labels for _, labels in val]).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset(tmp_path, workers):
    pytest.importorskip("webdataset")
    run = settings("wds", images.shards(tmp_path), data={"num_classes": 3}, workers=workers)
    data, train, val = open_data(run)
    assert (len(data.classes), len(data.train), len(data.val), train.updates) == (3, 24, 6, 6)
    seen = list(train.epoch(1))
    assert len(seen) == 6
    assert same(batches(run, epoch=1, start=2), seen[2:])
    assert same(list(train.epoch(1)), seen)
    assert not same(list(train.epoch(2)), seen)
    assert sorted(torch.cat([labels for _, labels in val]).tolist()) == [0, 0, 1, 1, 2, 2]


def test_labels_of_a_stream_are_those_of_its_classes(tmp_path):
    pytest.importorskip("webdataset")
    _, train, val = open_data(settings("wds", images.shards(tmp_path), data={"num_classes": 2}))
    for loader in (train.epoch(0), val):
        with raises_error(DataError, code="unreadable-data", names=["its class is 2", "from 0 to 1"]):
            list(loader)


def test_webdataset_without_description(tmp_path):
    pytest.importorskip("webdataset")
    root = images.shards(tmp_path)
    described = settings("wds", root, data={"num_classes": 3})
    expected = batches(described)
    (root / "_info.json").unlink()
    splits = {"train_split": "train-{0..3}.tar", "train_samples": 24, "val_split": "val-0.tar", "num_classes": 3}
    run = settings("wds", root, data=splits)
    _, train, val = open_data(run)
    assert same(list(train.epoch(0)), expected)
    assert sum(len(labels) for _, labels in val) == 6


def test_directories_of_one_tar_per_class(root, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for name in images.CLASSES:
            with tarfile.open(tmp_path / split / f"{name}.tar", "w") as tar:
                for path in sorted((root / split / name).iterdir()):
                    tar.add(path, path.name)
    data, _, val = open_data(settings("tar", tmp_path))
    assert (data.classes, len(data.train), len(data.val)) == (images.CLASSES, 24, 9)
    pictures, labels = (torch.cat(parts) for parts in zip(*val, strict=True))
    loose, numbers = (torch.cat(parts) for parts in zip(*open_data(settings("folder", root))[2], strict=True))
    assert sorted(labels.tolist()) == sorted(numbers.tolist())
    for label in range(3):
        torch.testing.assert_close(pictures[labels == label].mean(), loose[numbers == label].mean())


def test_processes_share_a_validation_stream_evenly(tmp_path):
    pytest.importorskip("webdataset")
    run = settings("wds", images.shards(tmp_path, each=5), data={"num_classes": 3})
    shares = []
    for rank in range(3):
        data = load_data(load_config(run).data, 0, None, World(rank, 3))
        shares.append([label for _, label in data.val])
    assert [len(share) for share in shares] == [2, 2, 2]
    assert sorted(label for share in shares for label in share) == [-1, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("policy", ["rand-m10-n4-inc1", "v0", "originalr", "augmix-m10"])
def test_strong_policies_never_fail(policy):
    """At the highest magnitudes timm posterizes to 0 bits, which Pillow refuses."""
    config = load_config(settings("folder", "x", augment={"auto_augment": policy})).data
    transform, picture = train_transform(config), images.image(1, 0)
    for number in range(150):
        with seeded(number):
            assert transform(picture).isfinite().all()
    assert posterize(picture, 0).getextrema() == ((0, 0),) * 3
    assert posterize(picture, 3).getextrema() == auto_augment.posterize(picture, 3).getextrema()


# ------------------------------------------------------------------------------------------------- broken images


def break_some(root):
    (root / "train" / "bee" / "3.jpg").write_bytes(images.jpeg(1, 3)[:300])
    (root / "train" / "cat" / "0.jpg").write_bytes(b"not an image")
    (root / "val" / "ant" / "1.jpg").write_bytes(b"")
    return root


def test_broken_images_are_replaced_logged_and_counted(tmp_path):
    root = break_some(images.folder(tmp_path / "data"))
    run = settings("folder", root, tmp_path / "run", workers=2, epochs=2)
    assert process(run) == 0, console_output(run)
    lines = (tmp_path / "run" / "unreadable.txt").read_text().splitlines()
    assert {line.split(": ")[0] for line in lines} == {"bee/3.jpg", "cat/0.jpg", "ant/1.jpg"}
    evals = [line for line in read_log(tmp_path / "run" / LOG) if line["kind"] == "eval"]
    assert [line["unreadable"] for line in evals] == [3, 3]
    assert console_output(run).count("3 unreadable images, listed in") == 2
    _, train, val = open_data(run)
    assert sum(len(labels) for _, labels in train.epoch(0)) == 24
    assert torch.cat([labels for _, labels in val]).tolist() == [0, -1, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_can_stop_a_run(tmp_path, workers):
    root = break_some(images.folder(tmp_path / "data"))
    run = settings("folder", root, data={"unreadable": "stop"}, workers=workers)
    with raises_error(DataError, code="unreadable-data") as error:
        batches(run)
    assert str(error.value).startswith(("bee/3.jpg: ", "cat/0.jpg: "))


def test_only_broken_images(tmp_path):
    root = images.folder(tmp_path / "data")
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"x")
    with raises_error(DataError, code="unreadable-data", names=["10 consecutive images", "data.root"]):
        batches(settings("folder", root))


def test_broken_images_of_webdataset_are_counted(tmp_path):
    pytest.importorskip("webdataset")
    root = images.shards(tmp_path / "data", broken=True)
    notes = tmp_path / "notes.txt"
    data, train, _ = open_data(settings("wds", root, data={"num_classes": 3}), notes=notes)
    assert sum(len(labels) for _, labels in train.epoch(0)) == 24
    assert data.unreadable.count() >= 1
    stop = settings("wds", root, data={"num_classes": 3, "unreadable": "stop"})
    with raises_error(DataError, code="unreadable-data", names="webdataset"):
        batches(stop)


# --------------------------------------------------------------------------------------------------- bad folders


@pytest.mark.parametrize(
    ("damage", "code", "names"),
    [
        (lambda root: shutil.rmtree(root), "missing-file", ()),
        (lambda root: shutil.rmtree(root / "val"), "missing-file", ["validation, val", "it contains train"]),
        (lambda root: [path.unlink() for path in root.rglob("train/*/*.jpg")], "empty-data", ["train", "images"]),
        (lambda root: (root / "val" / "bee").rename(root / "val" / "dog"), "class-mismatch", "class dog"),
    ],
)
def test_wrong_directories_are_refused(tmp_path, damage, code, names):
    root = images.folder(tmp_path / "data")
    damage(root)
    with raises_error(code=code, key="data.root", source="training run", names=names):
        open_data(settings("folder", root))


@pytest.mark.parametrize(
    ("name", "data", "code", "key", "names"),
    [
        ("folder", {"num_classes": 2}, "class-mismatch", "data.num_classes", ["2,", "3 classes"]),
        ("folder", {"train_split": "practice"}, "missing-file", "data.root", "practice"),
        ("tar", {}, "empty-data", "data.root", ["train", "tars"]),
        ("hfds/nowhere/nothing", {}, "unreadable-data", "data", "hfds/nowhere/nothing"),
        ("wds", {}, "unreadable-data", "data", ["wds/", "train"]),
        (
            "wds",
            {"train_split": "train-{0..3}.tar"},
            "unreadable-data",
            "data",
            ["wds/", "num_samples", "train_samples"],
        ),
    ],
)
def test_a_reader_without_images(root, name, data, code, key, names):
    with raises_error(code=code, key=key, source="training run", names=names):
        open_data(settings(name, root, data=data))


@pytest.mark.parametrize("name", ["hfds", "hfids"])
def test_an_unresolvable_hub_is_not_retried(tmp_path, monkeypatch, name):
    """Its client resolves the host name for every attempt."""
    constants = pytest.importorskip("datasets").config, pytest.importorskip("huggingface_hub").constants
    before, looked_up = [module.HF_HUB_OFFLINE for module in constants], []

    def getaddrinfo(host, *_):
        looked_up.append(host)
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("vision.data.timm_readers.getproxies", dict)
    with raises_error(code="unreadable-data", key="data", names=f"{name}/nowhere/nothing"):
        open_data(settings(f"{name}/nowhere/nothing", tmp_path))
    assert looked_up == ["huggingface.co"]
    assert [module.HF_HUB_OFFLINE for module in constants] == before


@pytest.mark.parametrize("split", ["train", "train-{0..3}.tar|24"])
def test_a_pipe_among_shards(tmp_path, split):
    pytest.importorskip("webdataset")
    root = images.shards(tmp_path)
    (root / "train-2.tar").unlink()
    os.mkfifo(root / "train-2.tar")
    with raises_error(code="not-a-file", key="data.root", names="train-2.tar"):
        open_data(settings("wds", root, data={"num_classes": 3, "train_split": split}))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_the_list_of_unreadable_images_must_be_a_file(root, tmp_path, make):
    make(tmp_path / "notes.txt")
    with raises_error(code="not-a-file", key="output", names="notes.txt"):
        open_data(settings("folder", root), tmp_path / "notes.txt")


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize(("name", "workers", "size"), [("folder", 2, 1), ("wds", 2, 1), ("wds", 0, 2)])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path, root, name, workers, size):
    """RandAugment, erasing, mixup, averaged weights, bfloat16 and supervision take part."""
    if name == "wds":
        pytest.importorskip("webdataset")
        root = images.shards(tmp_path / "shards")
    changes = {
        "workers": workers, "epochs": 2, "save_every": 2, "ema": {"decay": 0.9}, "amp": "bfloat16",
        "mixup": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}, "label_smoothing": 0.1, "supervision": {"heads": 2},
        "channels_last": True, "data": {"num_classes": 3},
    }  # fmt: skip
    runs = [settings(name, root, tmp_path / output, **changes) for output in ("whole", "killed")]
    assert set(together(runs[0], size=size)) == {0}, console_output(runs[0])
    update = 8 // size  # in the middle of an epoch, behind one that is finished
    assert together(runs[1], "before an update", update, size=size)[0] == -signal.SIGKILL
    assert set(together(runs[1], size=size)) == {0}, console_output(runs[1])
    last = f"step-{12 // size:07d}.pt"
    states = [reader.read(tmp_path / output / "checkpoints" / last) for output in ("whole", "killed")]
    for part in ("model", "ema", "heads", "optimizer", "progress"):
        assert_same(states[1][part], states[0][part], part)
