"""A teacher and images for labeling."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import image_folders
from tests.support.labeling import label, run_of, train, two_sources


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run with the heads `insects` and `eyes`; return its directory."""
    folder = tmp_path_factory.mktemp("teacher")
    train(run_of(folder / "run", *two_sources(folder), epochs=1))
    return folder / "run"


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 23 images in directories at two depths, one of which cannot be read."""
    folder = image_folders.folder(tmp_path_factory.mktemp("images"), train=7) / "train"
    (folder / "ant" / "6.jpg").write_bytes(b"no picture")
    for number in range(2):
        (folder / f"x{number}.jpg").write_bytes(image_folders.jpeg(1, 50 + number))
    return folder


@pytest.fixture(scope="session")
def labels(tmp_path_factory: pytest.TempPathFactory, teacher: Path, images: Path) -> Path:
    """Label the images; return the directory of the labels."""
    folder = tmp_path_factory.mktemp("labels") / "all"
    label(teacher, images, folder)
    return folder
