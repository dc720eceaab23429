"""Options of the model: checks, records in checkpoints, and networks from YAML files."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
import torch

from tests.support.errors import assert_error

pytest.importorskip("fairseq", reason="fairseq is not installed (extra nlp)")

from fairseq.models.transformer import TransformerConfig

from nlp.layers.transformer import TransformerBlock
from nlp.models.arguments import add_arguments
from nlp.models.encoder import RevColEncoder
from nlp.models.encoder_spec import DEFAULTS, MEANINGLESS, TRUST, encoder_spec
from nlp.models.revcol_transformer import RevColTransformerModel
from revnets.config.errors import ArgumentError
from revnets.config.net_spec import dump
from tests.support.fairseq import build, options, sample
from tests.support.paths import ROOT

NET = """
columns: 3
levels:
  - {dim: 64, depth: 1, block: transformer, heads: 4}
  - {dim: 32, depth: 2, block: mlp}
  - {dim: 64, depth: 1, block: transformer, dropout: 0.0}
"""

OWN = """
from torch import nn

class Masked(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x, padding_mask=None):
        return x + self.linear(x)
"""


def command_line(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fairseq-train", argument_default=argparse.SUPPRESS)
    RevColTransformerModel.add_args(parser)
    return parser.parse_args(given)


def write(folder: Path, text: str = NET) -> Path:
    path = folder / "net.yaml"
    path.write_text(text)
    return path


# ----------------------------------------------------------------------------------------------------- error messages


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"encoder_layerdrop": 0.2}, "--encoder-layerdrop 0.2: a reversible column cannot skip a cell"),
        ({"encoder_layers_to_keep": "0,1"}, "Use fewer --revcol-columns"),
        ({"encoder_layers": 3}, "--encoder-layers 3: the encoder has 8 blocks in 4 columns"),
        ({"quant_noise_pq": 0.1}, "--quant-noise-pq 0.1: the blocks of the columns are not quantized"),
        ({"encoder_attention_heads": 5}, "64 channels cannot be divided into 5 heads"),
        ({"revcol_gain": 0.0}, "0.0 is closer to 0 than min_abs"),
        ({"revcol_memory": "exakt"}, '"exakt" is not a memory mode. Did you mean exact?'),
        ({"revcol_memory": "exact,store"}, "2 modes for 4 columns"),
        ({"revcol_memory": "{budget: exakt}"}, 'memory.budget: "exakt" is not an amount of memory'),
        ({"revcol_stored": 9}, "--revcol-stored 9: the encoder has only 8 cells"),
        ({"revcol_stored": 1, "revcol_memory": "{budget: exact}"}, "a budget selects the cells itself"),
        ({"revcol_fusion": "lineal"}, 'there is no fusion "lineal". Did you mean linear?'),
        ({"revcol_fusion": "{type: linear, project: [abov]}"}, "fusion.project"),
        ({"revcol_fusion": "convnext"}, "changes the number of positions"),
        ({"revcol_norm": "post", "encoder_normalize_before": True}, "contradicts --encoder-normalize-before"),
        ({"quant_noise_scalar": 0.1}, "--quant-noise-scalar 0.1: its modules count their calls"),
        ({"activation_fn": "swish"}, 'options: levels.0.activation: "swish" is not a valid choice'),
        ({"revcol_spec": "missing.yaml"}, "missing.yaml"),
    ],
)
def test_invalid_options_end_the_command_with_one_line(given, expected):
    with pytest.raises(SystemExit) as caught:
        options(**given)
    message = str(caught.value)
    assert expected in message
    assert message.startswith("--arch revcol_transformer_tiny: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("given", "code", "key"),
    [
        ({"encoder_layerdrop": 0.2}, "reserved-key", "--encoder-layerdrop"),
        ({"quant_noise_scalar": 0.1}, "reserved-key", "--quant-noise-scalar"),
        ({"encoder_layers": 3}, "conflicting-values", "--encoder-layers"),
        ({"revcol_norm": "post", "encoder_normalize_before": True}, "conflicting-values", "--revcol-norm"),
        ({"revcol_stored": 9}, "out-of-range", "--revcol-stored"),
        ({"revcol_stored": 1, "revcol_memory": "{budget: exact}"}, "conflicting-values", "--revcol-stored"),
    ],
)
def test_errors_have_a_code_and_name_the_option(given, code, key):
    with pytest.raises(SystemExit) as caught:
        options(**given)
    assert_error(caught.value.__context__, ArgumentError, code=code, key=key)


@pytest.mark.parametrize("given", [("--revcol-columns", "0"), ("--revcol-blocks", "3"), ("--revcol-blocks", "1,x")])
def test_numbers_are_checked_as_they_are_typed(given, capsys):
    with pytest.raises(SystemExit):
        command_line(*given)
    assert f"fairseq-train: error: argument {given[0]}: '{given[1]}'" in capsys.readouterr().err


def test_layerdrop_is_refused_where_only_the_model_sees_it():
    with pytest.raises(ValueError, match="--encoder-layerdrop"):  # --model-overrides of fairseq-generate
        RevColTransformerModel.build_model(argparse.Namespace(encoder_layerdrop=0.1), None)


# -------------------------------------------------------------------------------------------------- recorded options


def test_recorded_options_build_the_same_network():
    given = command_line(
        *(
            "--revcol-columns",
            "3",
            "--revcol-blocks",
            "1,2",
            "--revcol-attention",
            "cosine",
            "--revcol-norm",
            "res-post",
        ),
        *("--revcol-gain", "0.25", "--revcol-memory", "store,exact,exact", "--revcol-fusion", "identity"),
    )
    args = options(**vars(given))
    spec = encoder_spec(vars(args))
    assert (spec.columns, [level.depth for level in spec.levels]) == (3, [1, 2])
    assert (spec.gain.init, spec.memory, spec.fusion.type) == (0.25, ("store", "exact", "exact"), "identity")
    assert {level.options["attention"] for level in spec.levels} == {"cosine"}
    encoder = build(**vars(given)).encoder
    assert encoder.columns.memory == ("store", "exact", "exact")
    assert encoder.columns.cells[1][0].gain.weight.eq(0.25).all()
    assert args.encoder_layers == 9


def test_fast_initialization_sets_gains_and_is_recorded():
    args = options(**vars(command_line("--revcol-init", "fast", "--revcol-columns", "3")))
    assert (args.revcol_init, args.revcol_gain) == ("fast", 1.0)
    encoder = build(**{key: value for key, value in vars(args).items() if key.startswith("revcol_")}).encoder
    assert encoder.spec.init == "fast"
    gains = [cell.gain.weight for column in list(encoder.columns.cells)[1:] for cell in column]
    assert all(gain.eq(1).all() for gain in gains)


def test_a_given_gain_is_kept_beside_an_initialization(tmp_path):
    assert encoder_spec(vars(options(revcol_init="fast", revcol_gain=0.25))).gain.init == 0.25
    path = write(tmp_path, f"{NET}gain: {{init: 0.5}}")
    spec = encoder_spec(vars(options(revcol_init="fast", revcol_spec=str(path))))
    assert (spec.init, spec.gain.init) == ("fast", 0.5)


def test_a_checkpoint_that_records_nothing_gets_the_defaults():
    args = options("revcol_transformer")
    old = {key: value for key, value in vars(args).items() if not key.startswith("revcol_")}
    assert dump(encoder_spec(old)) == dump(encoder_spec(vars(args)))
    cfg = TransformerConfig.from_namespace(argparse.Namespace(**old))
    with torch.device("meta"):
        embed = torch.nn.Embedding(7, 768, padding_idx=1)
        encoder = RevColEncoder(cfg, None, embed)
    assert (encoder.columns.graph.columns, encoder.columns.graph.m) == (4, 4)


def test_pre_norm_has_two_names_and_a_norm_at_the_end():
    one, other = build(revcol_norm="pre"), build(encoder_normalize_before=True)
    assert one.encoder.layer_norm is not None
    assert one.encoder.columns.cells[0][0].function.blocks[0].norm == "pre"
    assert torch.equal(*(model.eval()(**sample())[0] for model in (one, other)))
    assert build().encoder.layer_norm is None


# ----------------------------------------------------------------------------------------------------------------- YAML


def test_a_yaml_replaces_blocks_and_columns(tmp_path):
    path = write(tmp_path)
    model = build(revcol_spec=str(path), dropout=0.2, encoder_ffn_embed_dim=96)
    columns = model.encoder.columns
    first, middle, last = (cell.function.blocks for cell in columns.cells[0])
    assert (columns.graph.columns, columns.graph.m, len(middle)) == (3, 3, 2)
    assert isinstance(first[0], TransformerBlock)
    assert (first[0].attention.heads, last[0].attention.heads) == (4, 2)  # the file, the architecture
    assert (first[0].drop.p, last[0].drop.p, first[0].fc1.out_features) == (0.2, 0.0, 96)
    assert type(columns.cells[1][2].function.fusion).__name__ == "LinearFusion"
    model(**sample())[0].sum().backward()


def test_a_network_from_yaml_is_rebuilt_without_the_file(tmp_path, own_modules, monkeypatch):
    monkeypatch.setenv(TRUST, "1")
    (tmp_path / "my_masked_blocks.py").write_text(OWN)
    path = write(tmp_path, NET.replace("block: mlp", 'block: "my_masked_blocks:Masked"'))
    args = options(revcol_spec=str(path))
    path.unlink()
    monkeypatch.chdir("/")
    recorded = json.loads(json.dumps(vars(args)))
    rebuilt = build(**{key: recorded[key] for key in ("revcol_spec", "revcol_net")}).encoder.columns
    assert [type(block).__name__ for block in rebuilt.cells[2][1].function.blocks] == ["Masked"] * 2


def test_options_change_what_the_yaml_says(tmp_path):
    path = write(tmp_path)
    spec = encoder_spec(
        vars(options(revcol_spec=str(path), revcol_columns=5, revcol_memory="recompute", revcol_gain=-0.5))
    )
    assert (spec.columns, spec.memory, spec.gain.init) == (5, "recompute", -0.5)
    assert spec.fusion.options == {"project": ("above",)}
    path.write_text(f"{NET}memory: {{budget: 1GiB}}")
    assert encoder_spec(vars(options(revcol_spec=str(path)))).memory.budget == "1GiB"


@pytest.mark.parametrize(
    ("old", "new", "code", "key", "names"),
    [
        ("columns: 3", "colums: 3", "unknown-key", "colums", ["3", "Did you mean columns?"]),
        ("block: mlp", "block: vit, heads: 2", "invalid-component", "levels.0", "padding_mask"),
        (
            "dim: 64, depth: 1, block: transformer, dropout: 0.0",
            "dim: 32, depth: 1, block: mlp",
            "shape-mismatch",
            "levels.2.dim",
            ["32", "64"],
        ),
        ("columns: 3", "columns: 3\nhead: {type: classifier, num_classes: 2}", "reserved-key", "head", ()),
        ("columns: 3", "columns: 3\ntaps: [1]", "reserved-key", "taps", ()),
        ("columns: 3", "columns: 3\nmemory: {budget: 1GiX}", "invalid-value", "memory.budget", '"1GiX"'),
        ("heads: 4", "heads: 5", "not-divisible", "levels.0", ["64 channels", "5 heads"]),
    ],
)
def test_errors_in_the_yaml_name_the_file(tmp_path, old, new, code, key, names):
    path = write(tmp_path, NET.replace(old, new))
    with pytest.raises(SystemExit) as caught:  # the exit of fairseq-train
        options(revcol_spec=str(path))
    assert f": {path}: {key}: " in str(caught.value)
    assert_error(caught.value.__context__, code=code, source=path, key=key, names=names)


def test_blocks_of_the_levels_cannot_be_given_twice(tmp_path):
    with pytest.raises(SystemExit, match=r": --revcol-blocks: .*--revcol-spec"):
        options("revcol_transformer", revcol_spec=str(write(tmp_path)), revcol_blocks="1,1")


# ---------------------------------------------------------------------------------- docs/guides/translation-model.md

PAGE = (ROOT / "docs/guides/translation-model.md").read_text()


def test_the_page_names_every_option_with_its_default():
    rows = dict(re.findall(r"^\| `(--revcol-[a-z]+)[^|]*\| `?([^|`]*)`? +\|", PAGE, re.MULTILINE))
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    add_arguments(parser)
    offered = {action.option_strings[0]: action.dest for action in parser._actions if action.dest.startswith("revcol_")}
    assert {option: value.strip() for option, value in rows.items()} == {
        option: str(DEFAULTS.get(dest, "none")) for option, dest in offered.items()
    }


def test_the_page_names_every_option_that_is_refused():
    for option in (*MEANINGLESS, "encoder_layers", "checkpoint_activations"):
        assert f"`--{option.replace('_', '-')}`" in PAGE


def test_the_network_on_the_page_can_be_built(tmp_path, own_modules, monkeypatch):
    monkeypatch.setenv(TRUST, "")
    (tmp_path / "my_blocks.py").write_text(OWN.replace("Masked", "Mixer"))
    net = re.search(r"```yaml\n(columns.*?)```", PAGE, re.DOTALL)[1]
    args = options("revcol_transformer", **vars(command_line("--revcol-spec", str(write(tmp_path, net)))))
    assert args.encoder_layers == 8 * (1 + 2 + 1)


def test_parameters_on_the_page_are_those_of_the_models():
    for arch, million, words in re.findall(r"^\| `(revcol_\w+)`.*\| ([\d.]+) M \((\d+) types\) \|", PAGE, re.MULTILINE):
        with torch.device("meta"):
            model = build(arch, int(words))
        assert f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}" == million
