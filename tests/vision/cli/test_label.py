"""Output and exit codes of the command `revnets label`."""

from __future__ import annotations

import re

import typer
from typer.testing import CliRunner

from revnets import SpecError
from tests.support.errors import raises_error
from tests.support.labeled_images import images, labels, teacher  # noqa: F401  (fixtures)
from tests.support.labeling import contents
from vision.cli.label import label
from vision.labeling.command import throughput
from vision.pseudo_labels.label_files import read_labels

app = typer.Typer()
app.command("label")(label)


def call(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if isinstance(result.exception, SpecError):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


OPTIONS = ("--device", "cpu", "--batch-size", 4, "--shard-size", 5)


def test_files_and_throughput(teacher, images, labels, tmp_path):  # noqa: F811
    code, out, err = call(teacher, images, "-o", tmp_path / "labels", *OPTIONS)
    assert (code, err) == (0, "")
    assert "23 images in 5 shards, 0 of them labeled; heads: insects (3 classes), eyes (2 classes)" in out
    assert "part-00001.parquet: no label for unreadable images: ant/6.jpg" in out
    assert re.search(
        r"labeled 23 images in \d+\.\d s: \d+\.\d images/s; days for 168 million images .* on 8, .* on 64", out
    )
    assert contents(tmp_path / "labels") == contents(labels)


def test_days_are_those_of_168_million_images():
    assert throughput(1000.0).endswith("1.94 on 1, 0.243 on 8, 0.0304 on 64")


def test_a_student_is_the_teacher_of_the_second_round(teacher, images, tmp_path):  # noqa: F811
    assert call(teacher, images, "-o", tmp_path / "labels", *OPTIONS, "--round", 2)[0] == 0
    assert read_labels(tmp_path / "labels").provenance.round == 2
    with raises_error(code="settings-differ", key="--output", names="round"):
        call(teacher, images, "-o", tmp_path / "labels", *OPTIONS)


def test_errors_of_the_system_are_one_line(teacher, images, tmp_path):  # noqa: F811
    (tmp_path / "file").touch()
    code, _, err = call(teacher, images, "-o", tmp_path / "file" / "labels", *OPTIONS)
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert str(tmp_path / "file") in err
    code, _, err = call(tmp_path, images, "-o", tmp_path / "labels", *OPTIONS)
    assert code == 1
    assert err.count("\n") == 1
