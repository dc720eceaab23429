"""The wheel and the source distribution: their metadata, their contents, and the commands of each in an environment."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import revnets
from tests.support.paths import ROOT
from tests.support.timeouts import HANG

pytest.importorskip("build", reason="build is not installed (extra dev)")
pytest.importorskip("twine", reason="twine is not installed (extra dev)")


def run(*command: object, cwd: Path = ROOT) -> str:
    """What a command prints.

    Raises:
        AssertionError: it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both files by their suffix. `build` makes the wheel from the source distribution."""
    folder = tmp_path_factory.mktemp("distributions")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return {"whl": next(folder.glob("*.whl")), "tar.gz": next(folder.glob("*.tar.gz"))}


@pytest.fixture(scope="module")
def metadata(distributions: dict[str, Path]) -> email.message.Message:
    with zipfile.ZipFile(distributions["whl"]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(wheel.read(name))


def test_descriptions_are_valid(distributions):
    run(sys.executable, "-m", "twine", "check", "--strict", *distributions.values())


def test_metadata(metadata):
    assert metadata["Version"] == revnets.__version__
    assert metadata["Author"] or metadata["Author-email"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.13"} <= set(metadata.get_all("Classifier"))
    urls = {line.split(",")[0] for line in metadata.get_all("Project-URL")}
    assert {"Documentation", "Repository", "Issues", "Changelog"} <= urls


def test_the_extra_all_has_the_packages_of_every_application(metadata):
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]

    def packages(extra: str) -> set[str]:
        return {each.name for each in requirements if each.marker and each.marker.evaluate({"extra": extra})}

    for extra in set(metadata.get_all("Provides-Extra")) - {"dev", "docs"}:
        assert packages(extra) <= packages("all"), extra


def test_contents(distributions):
    with zipfile.ZipFile(distributions["whl"]) as wheel:
        files = wheel.namelist()
    packages = {name.split("/")[0] for name in files if ".dist-info/" not in name}
    assert packages == {"revnets", "vision", "revnets_nlp"}
    assert {f"{package}/py.typed" for package in packages} <= set(files)
    with tarfile.open(distributions["tar.gz"]) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= sources
    assert any(name.startswith("tests/revnets/") for name in sources)
    assert not any(part in name for name in sources for part in ("__pycache__", ".venv/", "runs/"))


@pytest.mark.parametrize("suffix", ["whl", "tar.gz"])
def test_every_command_works_after_installation(distributions, tmp_path, suffix):
    """In an environment with nothing but the distribution and the dependencies of this one."""
    for package in ("timm", "fairseq", "transformers", "pyarrow", "imagehash"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    dependencies = [folder for folder in sys.path if folder.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(dependencies))  # .pth files in them are not read
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, "--no-index", "--no-deps", "--no-build-isolation", distributions[suffix], cwd=tmp_path)
    run(python, ROOT / "tests" / "packaging" / "smoke_test.py", cwd=tmp_path)
