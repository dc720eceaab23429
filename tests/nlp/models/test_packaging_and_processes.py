"""Tests in separate processes: installed commands, two workers, and a wheel next to a user's package `nlp`."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("fairseq", reason="fairseq is not installed (extra nlp)")

from tests.support.fairseq import QUICK, TINY, USER_DIR, load, preprocess, train
from tests.support.forked_programs import Program
from tests.support.timeouts import HANG

ROOT = USER_DIR.parent
BIN = Path(sys.executable).parent
SHORT = ("--max-tokens", "300", "--disable-validation", "--dropout", "0.0", "--max-update", "3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preprocess(tmp_path_factory.mktemp("corpus"), pairs=400)


def start(*command: object, cwd: Path = ROOT, path: str = "") -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def forked(*command: object) -> Program:
    return Program(command, cwd=ROOT, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str] | Program) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=HANG)
    finally:
        process.kill()
    return process.returncode, output


def test_two_workers_train_as_one_with_two_batches_an_update(data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        forked(
            *(BIN / "fairseq-train", data, "--user-dir", "nlp", "--save-dir", tmp_path / "two", *TINY, *QUICK, *SHORT),
            *("--distributed-init-method", f"tcp://127.0.0.1:{port}", "--distributed-world-size", 2),
            *("--distributed-rank", rank, "--distributed-no-spawn", "--distributed-backend", "gloo"),
            *("--ddp-backend", "legacy_ddp"),
        )
        for rank in range(2)
    ]
    train(data, tmp_path / "one", *SHORT, "--update-freq", "2")
    for code, output in [finish(worker) for worker in workers]:
        assert code == 0, output
    one, two = (load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)


def test_a_forgotten_user_dir(data, tmp_path):
    """docs/guides/translation-model.md quotes fairseq's message and the fix."""
    train(data, tmp_path, *SHORT)
    commands = [
        forked(BIN / "fairseq-train", data, *TINY, "--cpu"),
        forked(BIN / "fairseq-generate", data, "--path", tmp_path / "checkpoint_last.pt", "--cpu"),
    ]
    page = (ROOT / "docs/guides/translation-model.md").read_text()
    for command, message in zip(commands, ("invalid choice: 'revcol_transformer", "argparse.Namespace"), strict=True):
        code, output = finish(command)
        assert code != 0
        assert message in output
        assert message in page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, installed in a directory."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    code, output = finish(start(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder))
    assert code == 0, output
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


PROGRAM = """
import json, sys
from fairseq_cli import train
from revnets_nlp.cli import FOLDER
import revnets_nlp.model  # fairseq does not import models of an imported package
sys.argv[1:] = [part.replace("FOLDER", str(FOLDER)) for part in sys.argv[1:]]
train.cli_main()
import nlp  # the user's own
names = [name for name in sys.modules if name.endswith(".encoder")]
print(json.dumps({"encoders": names, "folder": str(FOLDER), "mine": nlp.MINE}))
"""


def test_a_wheel_works_beside_a_package_nlp_of_the_user(site, data, tmp_path):
    (tmp_path / "nlp").mkdir()
    (tmp_path / "nlp" / "__init__.py").write_text("MINE = True\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    arguments = (data, "--user-dir", "FOLDER", "--save-dir", tmp_path / "saved", *TINY, *QUICK, *SHORT)
    code, output = finish(start(sys.executable, "program.py", *arguments, cwd=tmp_path, path=str(site)))
    assert code == 0, output
    found = json.loads(re.findall(r"^\{.*\}$", output, re.MULTILINE)[-1])
    ours = [name for name in found["encoders"] if name.split(".")[0] in ("nlp", "revnets_nlp")]
    assert ours == ["revnets_nlp.models.encoder"]
    assert found["folder"] == str(site / "revnets_nlp")
    assert found["mine"] is True
    assert load(tmp_path / "saved" / "checkpoint_last.pt")["cfg"]["model"].revcol_columns == 2


def test_the_wheel_holds_what_a_checkout_holds(site):
    code, listed = finish(start("git", "ls-files", "nlp"))
    if code:
        pytest.skip("not a git checkout")
    names = {name.removeprefix("nlp/") for name in listed.split()}
    assert names <= {str(path.relative_to(site / "revnets_nlp")) for path in (site / "revnets_nlp").rglob("*")}
    assert not (site / "nlp").exists()


def test_packages_of_the_wheel_are_typed(site):
    assert {path.parent.name for path in site.glob("*/py.typed")} == {"revnets", "vision", "revnets_nlp"}


ORDERS = [
    (first, second, model)
    for first, second in itertools.permutations(["nlp", "fairseq.models"])
    for model in ("nlp.model", "nlp.models.revcol_transformer")
]

IMPORTS = """
import importlib, json, os, sys
import torch  # each order of imports runs in a fork

for order in json.loads(sys.argv[1]):
    if not os.fork():
        assert not {"nlp", "fairseq"} & sys.modules.keys()
        for name in order:
            importlib.import_module(name)
        from fairseq.models import ARCH_MODEL_REGISTRY as models
        print(json.dumps([*order, models["revcol_transformer_tiny"].__module__]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def imported() -> set[tuple[str, ...]]:
    """Orders of imports, and the module of the registered model."""
    code, output = finish(start(sys.executable, "-c", IMPORTS, json.dumps(ORDERS)))
    assert code == 0, output
    return {tuple(json.loads(line)) for line in re.findall(r"^\[\".*\]$", output, re.MULTILINE)}


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_imports_register_the_model_in_any_order(imported, order):
    assert (*order, "nlp.models.revcol_transformer") in imported


def refusal(user_dir: object) -> tuple[object, ...]:
    """A fairseq command that reads an option of the model and refuses its value like the model."""
    command = (BIN / "fairseq-train", "data", "--user-dir", user_dir, "--arch", "revcol_transformer_tiny")
    return (*command, "--revcol-columns", "0")


def assert_knows_the_model(process: subprocess.Popen[str] | Program) -> None:
    code, output = finish(process)
    assert code == 2
    assert "'0' is not a number of columns" in output.splitlines()[-1], output


@pytest.fixture(scope="module")
def printed() -> str:
    """Return the output of `revnets user-dir`."""
    code, output = finish(start(BIN / "revnets", "user-dir"))
    assert code == 0, output
    return output


def test_fairseq_finds_the_model_in_a_checkout():
    assert_knows_the_model(start(*refusal("nlp")))


def test_fairseq_finds_the_model_in_the_folder_that_is_printed(printed):
    assert_knows_the_model(forked(*refusal(printed.strip())))


def test_fairseq_finds_the_model_in_a_wheel(site):
    assert_knows_the_model(start(*refusal(site / "revnets_nlp"), path=str(site)))


def test_the_folder_is_printed(printed):
    assert printed.strip() == str(USER_DIR)


WITHOUT = """
import importlib.abc, sys

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "fairseq":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
import nlp.models.encoder_spec
nlp.models.encoder_spec.encoder_columns(nlp.models.encoder_spec.encoder_spec({"encoder_embed_dim": 8}), 8)
import nlp.models.revcol_transformer
"""


def test_without_fairseq_columns_can_be_built_and_the_error_names_the_extra():
    code, output = finish(start(sys.executable, "-c", WITHOUT))
    assert code == 1
    assert (
        output.strip()
        .splitlines()[-1]
        .startswith("ModuleNotFoundError: the translation model needs fairseq: pip install")
    )
