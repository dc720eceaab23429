"""Class directories and tars: images, classes and their order; other content is ignored or refused."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path

import pytest
import torch

from tests.support import image_folders as images
from tests.support.errors import raises_error
from vision.config.run import load_config
from vision.data.class_subsets import class_difference
from vision.data.dataset import load_data
from vision.data.samplers import Key
from vision.errors import DataError
from vision.tasks.builders import build_model

CASES = ("folder", "tar", "tars")
"""A folder of class folders, a tar of them, and a folder of one tar per class."""


def tree(root: Path, *extra: str, classes=images.CLASSES) -> Path:
    """root/train/CLASS/N.jpg and root/val/CLASS/N.jpg, and further files."""
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(classes):
            for number in range(count):
                put(root / split / name / f"{number}.jpg", images.jpeg(label % 3, number))
    for path in extra:
        put(root / path, images.jpeg(0, 0))
    return root


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def packed(root: Path, kind: str) -> Path:
    """The same as tars, whose members begin with ./ as those of `tar -C train .`"""
    if kind == "folder":
        return root
    target = root.with_name(f"{root.name} as {kind}")
    target.mkdir()
    for split in ("train", "val"):
        if kind == "tar":
            with tarfile.open(target / f"{split}.tar", "w") as tar:
                tar.add(root / split, ".")
            continue
        for folder in sorted(path for path in (root / split).iterdir() if path.is_dir()):
            (target / split).mkdir(exist_ok=True)
            with tarfile.open(target / split / f"{folder.name}.tar", "w") as tar:
                tar.add(folder, ".")
    return target


def opened(root: Path, kind: str = "folder", notes: Path | None = None, **data):
    given = {"name": "folder" if kind == "folder" else "tar", "root": str(root), "img_size": 32, **data}
    config = load_config({"model": {"timm": "test_revcol"}, "output": "x", "data": given})
    return load_data(config.data, 0, notes)


def labels(data) -> list[int]:
    return [label for _, label in (data.val[index] for index in range(len(data.val)))]


LEFT_BEHIND = [
    "train/ant/.ipynb_checkpoints/0-checkpoint.jpg",
    "train/bee/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg",
    "train/cat/__MACOSX/._0.jpg",
    "train/ant/._0.jpg",
    "train/ant/.0.jpg",
    "train/ant/Thumbs.db",
    "val/ant/._1.jpg",
    "val/bee/.DS_Store",
    "train/ant/RECYCLER/0.jpg",
    "train/ant/Temporary Items/0.jpg",
]


@pytest.mark.parametrize("kind", CASES)
def test_leftover_files_of_programs_are_ignored(tmp_path, kind):
    root = tree(tmp_path / "data", *LEFT_BEHIND)
    if kind != "tars":
        for name in ("train/.cache/x.jpg", "val/.cache/x.jpg", "train/lost+found/x.jpg", "train/__MACOSX/ant/._0.jpg"):
            put(root / name, images.jpeg(0, 0))
    root = packed(root, kind)
    if kind == "tars":
        put(root / "train" / "._ant.tar", b"Mac OS X")
    data = opened(root, kind)
    assert (data.classes, len(data.train), len(data.val)) == (images.CLASSES, 12, 6)
    assert sorted(labels(data)) == [0, 0, 1, 1, 2, 2]
    assert data.remarks == ()


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", CASES)
def test_images_next_to_class_directories_are_refused(tmp_path, split, kind):
    name = f"{split}/ant/more/preview.jpg" if kind == "tars" else f"{split}/preview.jpg"
    root = packed(tree(tmp_path / "data", name), kind)
    with raises_error(code="class-mismatch", key="data.root", names="ant" if kind == "tars" else "preview.jpg"):
        opened(root, kind)


@pytest.mark.parametrize("kind", CASES)
def test_directories_of_the_same_name_are_refused(tmp_path, kind):
    """As in Tiny ImageNet, where every class directory has a directory `images`."""
    root = tmp_path / "data"
    for split in ("train", "val"):
        for label, name in enumerate(images.CLASSES):
            put(root / split / name / "images" / "0.jpg", images.jpeg(label, 0))
    root = packed(root, kind)
    if kind != "tars":
        with raises_error(code="class-mismatch", key="data.root", names=["ant/images", "bee/images"]):
            opened(root, kind)
        return
    config = load_config({"model": {"timm": "test_revcol"}, "output": "x", "data": {"name": "tar", "root": str(root)}})
    with raises_error(code="class-mismatch", key="data", names="images"):
        build_model(config, load_data(config.data, 0))


def test_a_flat_directory_has_no_classes(tmp_path):
    for split in ("train", "val"):
        put(tmp_path / split / "0.jpg", images.jpeg(0, 0))
    data = opened(tmp_path)  # other tasks than classification need no classes
    assert (data.classes, len(data.train)) == (("",), 1)


ORDER = """
import sys
from vision.config.run import load_config
from vision.data.class_subsets import class_difference
from vision.data.dataset import load_data
for name, root in zip(sys.argv[1::2], sys.argv[2::2]):
    data = {"name": name, "root": root, "img_size": 32}
    data = load_data(load_config({"model": {"timm": "test_revcol"}, "output": "x", "data": data}).data, 0)
    print(*data.classes)
"""


@pytest.fixture(scope="module")
def orders(tmp_path_factory) -> dict[str, set[str]]:
    """The classes as processes see them whose sets and dictionaries have other orders, by the kind of the data."""
    given, found = [], {"folder": set(), "tars": set()}
    for kind, name in (("folder", "folder"), ("tars", "tar")):
        classes = ("a", "A", "b", "B", "10", "2", "1", "01", "001")
        given += [name, packed(tree(tmp_path_factory.mktemp("order") / "data", classes=classes), kind)]
    for seed in "12":
        command = [sys.executable, "-c", ORDER, *given]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed})
        assert done.returncode == 0, done.stderr
        for kind, line in zip(found, done.stdout.splitlines(), strict=True):
            found[kind].add(line)
    return found


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_order_of_classes_does_not_depend_on_the_hash_seed(orders, kind):
    assert orders[kind] == {"001 01 1 2 10 A a B b"}


# ---------------------------------------------------------------------------------------------------------- links


def test_class_directories_may_be_links(tmp_path):
    store, root = tree(tmp_path / "store"), tmp_path / "data"
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for name in images.CLASSES:
            (root / split / name).symlink_to(store / split / name)
    data = opened(root)
    assert (data.classes, len(data.train), labels(data)) == (images.CLASSES, 12, labels(opened(store)))


def test_cyclic_links_are_not_followed(tmp_path):
    root = tree(tmp_path)
    for place in (root / "train", root / "train" / "ant"):
        for number in range(3):
            (place / f"again{number}").symlink_to(place)
    assert (opened(root).classes, len(opened(root).train)) == (images.CLASSES, 12)
    for level in range(20):  # 2^20 ways to the last
        (tmp_path / f"level{level}").mkdir()
        for number in range(2):
            (tmp_path / f"level{level}" / f"next{number}").symlink_to(tmp_path / f"level{level + 1}")
    (tmp_path / "level20").mkdir()
    (root / "train" / "dog").symlink_to(tmp_path / "level0")
    with raises_error(code="circular-reference", key="data.root", names="train/dog/next"):
        opened(root)


def test_a_broken_link_is_a_missing_class_or_an_unreadable_image(tmp_path):
    root = tree(tmp_path / "data")
    (root / "val" / "ant" / "0.jpg").unlink()
    (root / "val" / "ant" / "0.jpg").symlink_to(tmp_path / "gone.jpg")
    notes = tmp_path / "notes.txt"
    assert labels(opened(root, notes=notes)) == [-1, 0, 1, 1, 2, 2]
    assert notes.read_text().startswith("ant/0.jpg: ")
    (root / "train" / "dog").symlink_to(tmp_path / "gone")
    with raises_error(code="empty-data", key="data.root", names="dog"):
        opened(root)


def test_a_pipe_is_not_an_image(tmp_path):
    root = tree(tmp_path / "data")
    (root / "val" / "ant" / "0.jpg").unlink()
    os.mkfifo(root / "val" / "ant" / "0.jpg")
    assert labels(opened(root)) == [-1, 0, 1, 1, 2, 2]


# -------------------------------------------------------------------------------------------------------- endings


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("ending", [".webp", ".tif", ".bmp", ""])
def test_a_class_without_images_is_refused(tmp_path, kind, ending):
    root = tree(tmp_path / "data")
    for number in range(4):
        path = root / "train" / "bee" / f"{number}.jpg"
        path.rename(path.with_suffix(ending)) if ending else path.unlink()
    with raises_error(code="empty-data", key="data.root", names=["bee", ".jpeg .jpg .png", ending]):
        opened(packed(root, kind), kind)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_other_suffixes_can_be_read(tmp_path, kind):
    root = tree(tmp_path / "data")
    for split in ("train", "val"):
        for path in (root / split / "bee").iterdir():
            images.image(1, 0).save(path.with_suffix(".webp"))
            path.unlink()
    data = opened(packed(root, kind), kind, input_key="webp;.JPG")
    assert (data.classes, len(data.train), labels(data)) == (images.CLASSES, 12, [0, 0, 1, 1, 2, 2])


def test_images_with_other_suffixes_cause_a_warning(tmp_path):
    root = tree(tmp_path, "train/ant/7.gif", "train/bee/8.webp", "train/bee/notes.txt")
    (remark,) = opened(root).remarks
    assert remark.startswith("train: 2 images are not read, such as ant/7.gif. ")
    assert '".gif;.jpeg;.jpg;.png;.webp"' in remark


def test_upper_case_and_other_suffixes(tmp_path):
    root = tree(tmp_path / "data")
    for path in root.rglob("*.jpg"):
        path.rename(path.with_suffix(".JPEG"))
    assert len(opened(root).train) == 12
    for path in root.rglob("*.JPEG"):
        path.rename(path.with_suffix(".webp"))
    with raises_error(code="empty-data", key="data.root", names=[".jpeg .jpg .png", ".webp"]):
        opened(root)


def test_classes_of_the_validation_set(tmp_path):
    root = tree(tmp_path, "val/zebra/0.jpg", "val/yak/0.jpg")
    with raises_error(code="class-mismatch", key="data.root", names="validation has the classes yak, zebra"):
        opened(root)
    for name in ("train/yak/0.jpg", "train/zebra/0.jpg", "train/dog/0.jpg"):
        put(root / name, images.jpeg(0, 0))
    (root / "val" / "dog").mkdir()
    data = opened(root)
    assert data.remarks == ("validation has no images of dog",)
    assert labels(data) == [0, 0, 1, 1, 2, 2, 4, 5]


def test_class_map(tmp_path):
    """It lists the directories to read; others are ignored."""
    root = tree(tmp_path / "data", "train/preview.jpg", "train/ant/more/x.jpg")
    (tmp_path / "map.txt").write_text("cat\nant\n\n")
    data = opened(root, class_map=str(tmp_path / "map.txt"))
    assert (data.classes, len(data.train), labels(data)) == (("cat", "ant"), 8, [1, 1, 0, 0])
    (tmp_path / "map.txt").write_text("cat\nant\ncat\n")
    with raises_error(code="name-clash", key="data.class_map", names="cat"):
        opened(root, class_map=str(tmp_path / "map.txt"))
    (tmp_path / "map.txt").write_text("yak\nzebra\n")
    with raises_error(code="empty-data", key="data.class_map"):
        opened(root, class_map=str(tmp_path / "map.txt"))


@pytest.mark.parametrize("content", ["ant\nbee\ncat\n", "\ufeffant\r\nbee\r\ncat", " ant\rbee \rcat\r\r"])
def test_class_maps_with_any_line_endings_are_read(tmp_path, content):
    (tmp_path / "map.txt").write_bytes(content.encode())
    data = opened(tree(tmp_path / "data"), class_map=str(tmp_path / "map.txt"))
    assert (data.classes, labels(data), data.remarks) == (images.CLASSES, [0, 0, 1, 1, 2, 2], ())


def test_classes_outside_of_the_class_map_cause_a_warning(tmp_path):
    (tmp_path / "map.txt").write_text("ant\nbee\nyak\n")
    assert opened(tree(tmp_path / "data"), class_map=str(tmp_path / "map.txt")).remarks == (
        "train: data.class_map omits the images of cat",
        "validation: data.class_map omits the images of cat",
        "train has no images of yak",
        "validation has no images of yak",
    )


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"ant\n\nbee\n", "invalid-syntax"),
        ("ant\nbee\n".encode("utf-16"), "invalid-encoding"),
        (None, "missing-file"),
    ],
)
def test_damaged_class_maps(tmp_path, content, code):
    if content is not None:
        (tmp_path / "map.txt").write_bytes(content)
    with raises_error(code=code, key="data.class_map", names="map.txt"):
        opened(tree(tmp_path / "data"), class_map=str(tmp_path / "map.txt"))


# ----------------------------------------------------------------------------------------------------------- tars


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **about) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in about.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def two_tars(root: Path) -> Path:
    """root/train.tar and root/val.tar of two classes."""
    root.mkdir(exist_ok=True)
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            for label, name in enumerate(("ant", "bee")):
                add(tar, f"{name}/0.jpg", images.jpeg(label, 0))
    return root


def test_the_last_of_several_members_with_one_name_counts(tmp_path):
    root = two_tars(tmp_path)
    with tarfile.open(root / "val.tar", "a") as tar:
        add(tar, "./ant/0.jpg", images.jpeg(2, 5))
        add(tar, "bee/1.jpg", b"", type=tarfile.LNKTYPE, linkname="bee/0.jpg")
        add(tar, "bee/2.jpg", b"", type=tarfile.SYMTYPE, linkname="../ant/0.jpg")
        add(tar, "bee/3.jpg", b"", type=tarfile.SYMTYPE, linkname="nothing.jpg")
    data = opened(root, "tar", tmp_path / "notes.txt")
    assert labels(data) == [0, 1, 1, 1, -1]
    assert (tmp_path / "notes.txt").read_text().startswith("val.tar/bee/3.jpg: ")
    pictures = [data.val[index][0] for index in range(4)]
    assert torch.equal(pictures[0], pictures[3])
    assert torch.equal(pictures[1], pictures[2])
    assert pictures[0].mean() > pictures[1].mean()  # brightness is that of class 2


def test_nested_tars(tmp_path):
    """The images are those of the folder, bit for bit."""
    root = tree(tmp_path / "data")
    tars = packed(root, "tars")
    outer = tmp_path / "outer"
    outer.mkdir()
    for split in ("train", "val"):
        with tarfile.open(outer / f"{split}.tar", "w") as tar:
            for path in sorted((tars / split).iterdir()):
                tar.add(path, f"./{path.name}")
    found, wanted = opened(outer, "tar"), opened(root)
    assert found.classes == wanted.classes
    ours, theirs = (sorted((data.val[index] for index in range(6)), key=str) for data in (found, wanted))
    for (image, label), (other, number) in zip(ours, theirs, strict=True):
        assert torch.equal(image, other)
        assert label == number


@pytest.mark.parametrize("damage", ["cut in an image", "cut before the end mark", "a header of noise", "gzip", "empty"])
def test_a_damaged_tar_is_refused(tmp_path, damage):
    root = two_tars(tmp_path)
    content = (root / "train.tar").read_bytes()
    second = content.index(b"bee/0.jpg")
    (root / "train.tar").write_bytes({
        "cut in an image": content[: second + 700],
        "cut before the end mark": content[:second],
        "a header of noise": content[:second] + b"x" * 512 + content[second + 512 :],
        "gzip": b"\x1f\x8b" + content[2:],
        "empty": b"",
    }[damage])  # fmt: skip
    with raises_error(code="damaged-file", key="data.root", names="train.tar"):
        opened(root, "tar")


@pytest.mark.parametrize("key", ["path", "linkpath"])
def test_a_tar_with_an_overlong_name_is_refused(tmp_path, key):
    """A global header would give a name of megabytes to every member."""
    root = two_tars(tmp_path)
    with tarfile.open(root / "train.tar", "w", pax_headers={key: "a/" * 4000 + "b"}) as tar:
        add(tar, "ant/0.jpg", type=tarfile.SYMTYPE, linkname="1.jpg")
    with raises_error(code="damaged-file", key="data.root", names="8001 characters"):
        opened(root, "tar")


def test_sizes_in_a_tar_are_those_of_its_bytes(tmp_path):
    root = two_tars(tmp_path)
    for kind, size in ((tarfile.REGTYPE, 2**62), (tarfile.REGTYPE, 2**33), (tarfile.GNUTYPE_LONGNAME, 2**40)):
        header = tarfile.TarInfo("ant/0.jpg")
        header.type, header.size = kind, size
        (root / "train.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        with raises_error(code="damaged-file", key="data.root", names="train.tar"):
            opened(root, "tar")


@pytest.mark.parametrize(
    "stray",
    ["train/preview.jpg", "train/dog/0.jpg", "train/more/dog.tar", "train/dog.tar.gz", "train/dog.TGZ", "val/dog.zip"],
)
def test_other_data_next_to_tars_is_refused(tmp_path, stray):
    root = packed(tree(tmp_path / "data"), "tars")
    put(root / stray, images.jpeg(0, 0))
    with raises_error(code="class-mismatch", key="data.root", names=stray.split("/")[1]):
        opened(root, "tar")


def test_an_archive_in_a_tar_is_refused(tmp_path):
    with tarfile.open(two_tars(tmp_path) / "train.tar", "a") as tar:
        add(tar, "cat.tar.gz", b"packed")
    with raises_error(code="damaged-file", key="data.root", names="cat.tar.gz"):
        opened(tmp_path, "tar")


def test_an_empty_tar_and_one_of_another_case(tmp_path):
    root = packed(tree(tmp_path / "data"), "tars")
    (root / "train" / "bee.tar").rename(root / "train" / "bee.TAR")
    assert opened(root, "tar").classes == images.CLASSES
    tarfile.open(root / "train" / "dog.tar", "w").close()
    with raises_error(code="empty-data", key="data.root", names="dog"):
        opened(root, "tar")


# ---------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["set [v2]", "a*b?", "{a,b}", "zwölf", "100%", "$HOME", "#1", "x" * 200])
@pytest.mark.parametrize("kind", CASES)
def test_any_path(tmp_path, name, kind):
    root = tmp_path / name / "data"
    data = opened(packed(tree(root), kind), kind)
    assert (data.classes, len(data.train), sorted(labels(data))) == (images.CLASSES, 12, [0, 0, 1, 1, 2, 2])
    assert opened(f"{root}//").classes == images.CLASSES


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Äsche") for form in ("NFC", "NFD"))
    root = tree(tmp_path / "data", classes=("bee", composed))
    (root / "val" / composed).rename(root / "val" / decomposed)
    data = opened(root)
    assert (data.classes, labels(data)) == (("bee", composed), [1, 1, 0, 0])
    assert class_difference(data.classes, ("bee", decomposed)) == ""
    put(root / "train" / decomposed / "0.jpg", images.jpeg(0, 0))
    with raises_error(code="class-mismatch", key="data.root", names=composed):
        opened(root)


def test_names_that_are_not_utf_8(tmp_path):
    """Bytes that are not UTF-8 and line feeds: one line each, counted once."""
    root = tree(tmp_path / "data")
    for name in (b"h\xf6he.jpg", b"two\nlines.jpg"):
        with open(os.path.join(os.fsencode(root / "val" / "ant"), name), "wb") as file:
            file.write(b"not an image")
    os.rename(os.fsencode(root / "val" / "bee"), os.fsencode(root / "val") + b"/b\xe9e")
    os.rename(os.fsencode(root / "train" / "bee"), os.fsencode(root / "train") + b"/b\xe9e")
    data = opened(root, notes=tmp_path / "notes.txt")
    assert data.classes == ("ant", r"b\udce9e", "cat")
    assert labels(data).count(-1) == data.unreadable.count() == 2
    lines = (tmp_path / "notes.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(line.split(": ")[0] for line in lines) == [r"ant/h\udcf6he.jpg", r"ant/two\nlines.jpg"]
    put(root / "train" / "two\nlines.jpg", images.jpeg(0, 0))
    with raises_error(code="class-mismatch", key="data.root", names=r"two\nlines.jpg"):
        opened(root)


def test_ten_unreadable_images_name_the_first(tmp_path):
    root = tree(tmp_path)
    for path in root.rglob("train/*/*.jpg"):
        path.write_bytes(b"x")
    with raises_error(DataError, code="unreadable-data", names="number 0 (ant/0.jpg)"):
        _ = opened(root).train[Key(0, 0)]
