"""WMT scripts: their commands accept every option, with the intended values."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest

pytest.importorskip("fairseq")

import typer
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from typer.testing import CliRunner

from nlp import cli
from nlp.data.recipe import RECIPES, read_recipe
from nlp.models import revcol_transformer as revcol_transformer  # --user-dir does not register it again

CONFIGS = RECIPES.parent
COMMANDS = ("revnets", "fairseq-train", "fairseq-generate")
RECORD = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=file)
"""


@pytest.fixture
def calls(tmp_path):
    """Run a script with commands that only record their arguments, and return these."""
    for name in COMMANDS:
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(RECORD)
        command.chmod(command.stat().st_mode | stat.S_IEXEC)

    def call(script: str, *arguments: str, **variables: str) -> list[list[str]]:
        record = tmp_path / "record"
        record.write_text("")
        paths = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RECORD": str(record), "RUN": str(tmp_path)}
        command = ["bash", str(CONFIGS / f"{script}.sh"), *arguments]
        subprocess.run(command, check=True, env={**os.environ, **paths, **variables}, cwd=tmp_path)
        return [json.loads(line) for line in record.read_text().splitlines()]

    return call


def parse_train(words: list[str]) -> Namespace:
    """Parse a command line like fairseq-train; unknown options exit."""
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, words)
    convert_namespace_to_omegaconf(args)
    return args


TRAINED = [
    ("wmt16_en_de", "revcol", "8gpu", "revcol_transformer_wmt_en_de", 5e-4, 1, 0.3, 3584),
    ("wmt16_en_de", "revcol", "big", "revcol_transformer_wmt_en_de", 1e-3, 16, 0.3, 3584),
    ("wmt16_en_de", "vanilla", "8gpu", "transformer_vaswani_wmt_en_de_big", 5e-4, 1, 0.3, 3584),
    ("wmt16_en_de", "vanilla", "big", "transformer_vaswani_wmt_en_de_big", 1e-3, 16, 0.3, 3584),
    ("wmt14_en_fr", "revcol", "8gpu", "revcol_transformer_wmt_en_fr", 5e-4, 1, 0.1, 5120),
    ("wmt14_en_fr", "revcol", "big", "revcol_transformer_wmt_en_fr", 7e-4, 16, 0.1, 5120),
    ("wmt14_en_fr", "vanilla", "big", "transformer_vaswani_wmt_en_fr_big", 7e-4, 16, 0.1, 5120),
]


@pytest.mark.parametrize(("script", "model", "batch", "arch", "lr", "update_freq", "dropout", "max_tokens"), TRAINED)
def test_training(calls, script, model, batch, arch, lr, update_freq, dropout, max_tokens):
    ((command, *words),) = calls(script, "train", model, batch)
    assert command == "fairseq-train"
    args = parse_train(words)
    assert args.arch == arch
    assert args.lr == [lr]
    assert args.update_freq == [update_freq]
    assert (args.dropout, args.max_tokens, args.fp16) == (dropout, max_tokens, True)
    assert (args.share_all_embeddings, args.warmup_updates, args.label_smoothing) == (True, 4000, 0.1)
    assert Path(args.user_dir) == CONFIGS.parent
    assert Path(args.save_dir).is_absolute()


ARCHITECTURE = re.compile(
    "arch|save_dir|(en|de)coder_(embed|ffn_embed|input|output|hidden)_dim|encoder_layers|"
    "(en|de)coder_attention_heads|revcol_.*|no_save_optimizer_state"
)
"""Options that may differ between RevCol and the vanilla transformer: the sizes of the paper."""


@pytest.mark.parametrize("script", ["wmt16_en_de", "wmt14_en_fr"])
def test_both_models_are_trained_alike(calls, script):
    """The defaults of both architectures agree too: dropout rates, norms, embeddings."""
    found = {}
    for model in ("revcol", "vanilla"):
        ((_, *words),) = calls(script, "train", model)
        found[model] = vars(parse_train(words))
    keys = found["revcol"].keys() | found["vanilla"].keys()
    differ = {key for key in keys if found["revcol"].get(key) != found["vanilla"].get(key)}
    assert {key for key in differ if not ARCHITECTURE.fullmatch(key)} == set()
    assert {"dropout", "attention_dropout", "activation_dropout", "encoder_normalize_before"} <= keys
    assert found["vanilla"]["attention_dropout"] == found["revcol"]["attention_dropout"] == 0.0


def test_an_unknown_option_of_fairseq_is_found(calls, capsys):
    ((_, *words),) = calls("wmt16_en_de", "train")
    with pytest.raises(SystemExit):
        parse_train([*words, "--warm-up-updates", "4000"])
    assert "unrecognized arguments: --warm-up-updates" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["wmt16_en_de", "wmt14_en_fr"])
def test_all_steps(calls, script):
    """Steps run in order, with valid options and matching files."""
    found = calls(script, "all", DATA="data-bin/x", MAX_UPDATE="7")
    assert [line[:2] if line[0] == "revnets" else line[:1] for line in found] == [
        ["revnets", "prepare-mt"],
        ["fairseq-train"],
        ["revnets", "average-checkpoints"],
        ["fairseq-generate"],
        ["revnets", "score-mt"],
    ]
    prepare, train, average, generate, score = found
    assert parse_train(train[1:]).max_update == 7
    args = options.parse_args_and_arch(options.get_generation_parser(), generate[1:])
    assert (args.beam, args.lenpen, args.post_process, args.gen_subset) == (4, 0.6, "subword_nmt", "test")
    assert args.required_batch_size_multiple == 1  # every sentence of the test set is translated
    assert args.data == "data-bin/x" == prepare[prepare.index("--output") + 1] == train[1]
    assert args.path == average[average.index("--output") + 1]

    recipe, _ = read_recipe([prepare[2]], {})
    assert score[score.index("--language") + 1] == recipe.codes[1]
    assert score[score.index("--test-set") + 1].endswith(recipe.languages)
    for function, words in ((cli.prepare_mt, prepare), (cli.average_checkpoints, average), (cli.score_mt, score)):
        app = typer.Typer()
        app.command()(function)
        command = typer.main.get_command(app)
        command.make_context("revnets", list(words[2:]))  # parses, checks, and does not run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian",), "STEP trian: choose"),
        (("train", "revcl"), "MODEL revcl: choose revcol or vanilla"),
        (("train", "revcol", "8gpus"), "BATCH 8gpus: choose 8gpu or big"),
    ],
)
def test_a_mistyped_argument_is_named(arguments, message):
    command = ["bash", str(CONFIGS / "wmt16_en_de.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(message)


def test_help_names_the_recipes():
    app = typer.Typer()
    app.command()(cli.prepare_mt)
    message = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
    for file in RECIPES.glob("*.yaml"):
        assert file.stem in message
