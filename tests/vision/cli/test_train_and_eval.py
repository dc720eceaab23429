"""Output and exit codes of the commands `revnets train` and `revnets eval`."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import typer
import yaml
from typer.testing import CliRunner

from revnets import SpecError
from tests.support.errors import raises_error
from tests.support.training_runs import tiny
from vision.cli import main

app = typer.Typer()
app.command("train")(main.train)
app.command("eval")(main.evaluate)
app.command("reshard")(main.reshard)


def call(*words) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if isinstance(result.exception, SpecError):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "run.yaml").write_text(yaml.safe_dump(tiny(folder / "run", epochs=1)))
    code, out, _ = call("train", folder / "run.yaml", "keep=1")
    assert code == 0
    assert re.search(r"epoch 1/1 .* top-1 raw \d+\.\d\d %  ema \d+\.\d\d %", out)
    assert f"best top-1 {out.split('ema ')[1].split()[0]} %, {folder / 'run' / 'checkpoints' / 'best.pt'}" in out
    return folder / "run"


def test_train_again_has_nothing_to_do(run):
    code, out, _ = call("train", run / "config.yaml")
    assert code == 0
    assert "finished, step 5" in out
    assert "epoch 1/1" not in out


def test_eval_shows_both_sets_of_weights(run, tmp_path):
    code, out, _ = call("eval", run, "--png", tmp_path / "confusion.png", "batch_size=90")
    assert code == 0
    assert "best.pt, 360 images" in out
    logged = yaml.safe_load((run / "log.jsonl").read_text().splitlines()[-1])
    for name in ("raw", "ema"):
        top1, top5, loss = (logged[f"{name}_{key}"] for key in ("top1", "top5", "loss"))
        assert re.search(rf"{name} .*{top1:.2f}.*{top5:.2f}.*{loss:.4f}", out)
    assert (tmp_path / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    code, out, _ = call("eval", run / "checkpoints" / "step-0000005.pt")
    assert code == 0
    assert "step-0000005.pt, 360 images" in out


def test_eval_checks_the_suffix_of_a_figure_first(run, tmp_path):
    with raises_error(code="unknown-suffix", source="command line", key="--png", names=["x.jpg", ".png, .svg, .pdf"]):
        call("eval", run, "--png", tmp_path / "x.jpg")


def test_errors_are_one_line_with_exit_code_1(run, tmp_path):
    cut = tmp_path / "cut.pt"
    cut.write_bytes((run / "checkpoints" / "best.pt").read_bytes()[:1000])
    for words, named in (
        (("eval", tmp_path), tmp_path),
        (("eval", tmp_path / "no.pt"), tmp_path / "no.pt"),
        (("eval", cut), cut),
        (("train", run / "config.yaml", f"resume={cut}"), cut),
        (("train", run / "config.yaml", "model.columns=2"), "columns.cells.2.0"),
    ):
        code, out, err = call(*words)
        assert code == 1
        assert str(named) in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in out + err


def test_configuration_errors_reach_the_main_program(run, tmp_path):
    (tmp_path / "file").touch()
    with raises_error(code="not-a-folder", key="output", names=str(tmp_path / "file")):
        call("train", run / "config.yaml", f"output={tmp_path / 'file' / 'run'}")
    with raises_error(code="unknown-key", key="epoch", source="command line"):
        call("train", run / "config.yaml", "epoch=3")
    with raises_error(code="unknown-key", key="batch_sise", source="command line"):
        call("eval", run, "batch_sise=3")


def test_help_explains_overrides_and_output_files():
    code, out, _ = call("train", "--help")
    assert code == 0
    for words in ("key.path=value", "checkpoints/", "bit for bit", "torchrun"):
        assert words in out


def test_torchrun_and_reshard(tmp_path):
    """The command for a machine with two GPUs, and its checkpoint as one file."""
    settings = tiny(tmp_path / "run", epochs=1, grad_accum=1, parallel="fsdp", checkpoint="sharded", device="cpu")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node", "2"]
    command = [
        *torchrun,
        sys.executable,
        "-c",
        "from revnets.cli.main import main; main()",
        "train",
        tmp_path / "run.yaml",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 1/1") == result.stdout.count("best top-1") == 1
    code, out, _ = call("reshard", tmp_path / "run" / "checkpoints" / "best", tmp_path / "whole.pt")
    assert (code, out.split()) == (0, ["wrote", str(tmp_path / "whole.pt")])
    outputs = [call("eval", path)[1].splitlines()[1:] for path in (tmp_path / "run", tmp_path / "whole.pt")]
    assert outputs[0] == outputs[1]
    code, _, err = call("reshard", tmp_path / "run" / "checkpoints" / "best", tmp_path / "whole.pt")
    assert (code, str(tmp_path / "whole.pt") in err) == (1, True)
