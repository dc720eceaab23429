"""fairseq checkpoints cannot name code of other packages in their columns, files or other options."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("fairseq", reason="fairseq is not installed (extra nlp)")

from nlp.models import arguments
from nlp.models.arguments import add_arguments, settle
from nlp.models.encoder_spec import TRUST, are_trusted, encoder_spec
from tests.support import forked_programs
from tests.support.errors import raises_error
from tests.support.fairseq import build, options
from tests.support.paths import ROOT

CODE = "__import__('pathlib').Path('canary').touch()"
MODULE = """
from pathlib import Path
from torch import nn
Path('canary').touch()
class Masked(nn.Module):
    def __init__(self, dim, **options):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
    def forward(self, x, padding_mask=None):
        return x + self.linear(x)
"""


@pytest.fixture(autouse=True)
def folder(own_modules, monkeypatch) -> Path:
    """A working directory with a module whose import writes a file, and another directory."""
    monkeypatch.chdir(own_modules)
    monkeypatch.setenv(TRUST, "")
    monkeypatch.setattr(arguments, "_typed", set())
    (own_modules / "stranger.py").write_text(MODULE)
    (own_modules / "elsewhere").mkdir()
    (own_modules / "elsewhere" / "neighbor.py").write_text(MODULE)
    return own_modules


def columns(block: str, **given: object) -> str:
    level = {"dim": 64, "depth": 1, "block": "transformer"}
    return json.dumps({"columns": 2, "levels": [level, {**level, "block": block, **given}, level]})


def command_line(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    add_arguments(parser)
    return parser.parse_args(given)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"revcol_net": columns("sympy:simplify", expr=CODE)}, "sympy:simplify"),
        ({"revcol_net": columns("stranger:Masked")}, "stranger:Masked"),
        ({"revcol_net": columns("neighbor:Masked"), "revcol_spec": "elsewhere/net.yaml"}, "neighbor:Masked"),
        ({"revcol_net": json.dumps({**json.loads(columns("mlp")), "base": "elsewhere/net.yaml"})}, "base"),
        ({"revcol_spec": "elsewhere/net.yaml"}, "neighbor:Masked"),
        ({"revcol_fusion": "{type: 'sympy:simplify', expr: \"" + CODE + '"}'}, "sympy:simplify"),
        ({"revcol_fusion": "stranger:Masked"}, "stranger:Masked"),
        ({"adaptive_softmax_cutoff": CODE}, "adaptive-softmax-cutoff"),
        ({"decoder_xformers_att_config": CODE}, "decoder-xformers-att-config"),
        ({"encoder_xformers_att_config": CODE}, "encoder-xformers-att-config"),
        ({"revcol_net": "[1]"}, "revcol_net"),
        ({"revcol_net": "[" * 100_000}, "revcol_net"),
        ({"revcol_net": '{"levels": '}, "revcol_net"),
        ({"revcol_net": '{"levels": [], "columns": %s}' % ("9" * 5000)}, "revcol_net"),
        ({"revcol_net": ["levels"]}, "revcol_net"),
        ({"revcol_blocks": "1,x"}, "revcol-blocks"),
        ({"revcol_blocks": "9" * 5000}, "revcol-blocks"),
        ({"dropout": {1}}, "dropout"),
        ({"revcol_columns": 10**5000}, "revcol_columns"),
    ],
)
def test_options_of_a_checkpoint_run_nothing(folder, given, name):
    (folder / "elsewhere" / "net.yaml").write_text(columns("neighbor:Masked"))
    with pytest.raises(SystemExit) as caught:  # the last line of `fairseq-generate`
        build(**given)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "canary").exists()


def test_model_overrides_run_nothing(folder):
    """fairseq-generate passes overrides in the options of the model."""
    args = options()
    args.revcol_fusion = "stranger:Masked"
    with raises_error(code="not-trusted", key="fusion"):
        encoder_spec(vars(args))
    assert not (folder / "canary").exists()


@pytest.mark.parametrize("option", ["spec", "fusion"])
def test_the_command_line_is_trusted_and_so_are_processes_that_it_starts(folder, option):
    (folder / "net.yaml").write_text(columns("stranger:Masked"))
    (folder / "fuse.py").write_text("from revnets.nn.fusions import LinearFusion\nclass Fuse(LinearFusion): pass\n")
    given = {"spec": ("--revcol-spec", "net.yaml"), "fusion": ("--revcol-fusion", "fuse:Fuse")}[option]
    args = options(**vars(command_line(*given)))
    assert are_trusted(vars(args))
    settle(args, None)  # fairseq repeats it when it builds the model
    recorded = json.dumps(vars(args))
    code = (
        "import argparse, json, sys; from nlp.models.encoder_spec import encoder_spec; "
        "print(encoder_spec(json.loads(sys.argv[1])).columns)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for trust, columns_there in ((os.environ[TRUST], True), ("1", True), ("", False), ("0", False)):
        done = forked_programs.run([sys.executable, "-c", code, recorded], env={**environment, TRUST: trust})
        assert (done.returncode == 0) is columns_there, done.stderr
        assert columns_there or "not trusted" in done.stderr.splitlines()[-1]


def test_trust_is_for_the_columns_that_were_given(folder):
    (folder / "net.yaml").write_text(columns("stranger:Masked"))
    args = options(**vars(command_line("--revcol-spec", "net.yaml")))
    (folder / "canary").unlink()
    with pytest.raises(SystemExit, match="neighbor:Masked"):
        build(revcol_spec=args.revcol_spec, revcol_net=columns("neighbor:Masked"))
    assert not (folder / "canary").exists()
