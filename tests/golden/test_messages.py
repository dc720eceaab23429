"""The wording of real errors, compared with tests/golden/messages.txt.

Other tests check codes and keys. After a change of wording:

    python -m pytest -n 0 tests/golden --update-golden
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import revnets
from revnets.cli import output
from revnets.cli.common import parse_dtype, reversible_model
from revnets.config.errors import ConfigError
from revnets.config.registry import find_component
from revnets.engine.cell import FixedGain, Gain
from revnets.engine.columns_group import find_columns
from revnets.models.loading import load_model
from revnets.nn.blocks import ConvNeXtBlock, DropPath, ViTBlock
from revnets.nn.stems_and_heads import TokenStem
from revnets.plotting.graph import graph_figure
from revnets.plotting.style import save
from tests.support.spec_mistakes import GOOD, MISTAKES

GOLDEN = Path(__file__).parent / "messages.txt"
NET = {
    "columns": 2,
    "stem": {"type": "linear", "in_dim": 64},
    "levels": [{"dim": 8, "depth": 1, "block": "mlp"}] * 2,
    "fusion": "linear",
}

Case = tuple[str, Callable[[], Any]]


def entry(title: str, action: Callable[[], Any], folder: Path) -> str:
    """Return title, class and code of the error that an action raises, and its message without `folder`."""
    with pytest.raises(Exception) as caught:
        action()
    error: Any = caught.value
    assert hasattr(error, "code"), f"{title}: {error!r}"
    text = str(error).replace(f"{folder}/", "").replace(str(folder), "FOLDER")
    kind = "ConfigError" if isinstance(error, ConfigError) else type(error).__name__
    return f"{title} [{kind} {error.code}]\n    {text}\n"


def spec_cases(folder: Path) -> list[Case]:
    """Return the mistakes in a YAML file of a network."""
    cases: list[Case] = []
    for number, mistake in enumerate(MISTAKES):
        if "TypeError" in mistake.names:  # the message comes from PyTorch
            continue
        file = folder / str(number) / "net.yaml"
        file.parent.mkdir()
        file.write_text(mistake.text)
        new = mistake.new.strip().replace("\n", " ") or "-"
        old = mistake.old.strip().splitlines()[0]
        cases.append((f"spec: {old} -> {new}", lambda file=file: revnets.build(os.path.relpath(file.resolve()))))
    return cases


def file_cases() -> list[Case]:
    """Return files in the working directory and overrides that the loader rejects."""
    texts: dict[str, str | bytes] = {
        "empty.yaml": "",
        "list.yaml": "- name\n",
        "open.yaml": "columns: {\n",
        "tab.yaml": "columns: 2\n\tstem: 1\n",
        "twice.yaml": "columns: 2\ncolumns: 3\n",
        "number.yaml": "1: two\n",
        "tag.yaml": "columns: !!binary aGVsbG8=\n",
        "latin.yaml": b"columns: \xff\n",
        "nan.yaml": "columns: .nan\n",
        "loop.yaml": "gain: &loop {x: *loop}\n",
        "self.yaml": "base: self.yaml\n",
        "based.yaml": "base: nt.yaml\n",
        "bases.yaml": "base: [a.yaml, b.yaml]\n",
        "net.yaml": GOOD,
    }
    for name, text in texts.items():
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    names = [*(name for name in texts if name != "net.yaml"), "nets.yaml", "elsewhere/missing.yaml", "."]
    cases: list[Case] = [(f"file: {name}", lambda name=name: revnets.build(name)) for name in names]
    for text in ("columns", "levels.9.dim=3", "columns.x=3", "columns=[1, 2", "columns=", "colums=3", "columns=1e3"):
        cases.append((f"override: {text}", lambda text=text: revnets.build("net.yaml", [text])))
    return cases


def model_cases() -> list[Case]:
    """Return errors of models, components and plans."""
    net = revnets.build(NET)
    return [
        ("model: no such name", lambda: load_model("xyz.unknown")),
        ("model: no such module", lambda: load_model("no_such_module:make")),
        ("model: refuses its options", lambda: load_model("torch.nn:Linear", ["in_features=3"])),
        ("model: not a module", lambda: load_model("builtins:dict")),
        ("model: no columns", lambda: reversible_model("torch.nn:Identity", [])),
        ("component: no such name", lambda: find_component("block", "convnest")),
        ("component: name taken", lambda: revnets.register_block("mlp")(nn.Identity)),
        ("component: colon in a name", lambda: revnets.register_block("my:block")),
        ("block: drop_path", lambda: DropPath(1.0)),
        ("block: kernel_size", lambda: ConvNeXtBlock(8, kernel_size=4)),
        ("block: heads", lambda: ViTBlock(12, heads=5)),
        ("block: vectors", lambda: ViTBlock(8, heads=2)(torch.ones(2, 8))),
        ("stem: img_size", lambda: TokenStem(6, img_size=9, patch=4)),
        ("stem: other images", lambda: TokenStem(6, img_size=8, patch=4)(torch.ones(1, 3, 12, 8))),
        ("plan: nothing fits", lambda: revnets.plan(NET, (2, 64), budget="1KiB")),
        ("plan: no amount", lambda: revnets.plan(NET, (2, 64), budget="lots")),
        ("plan: optimizer", lambda: revnets.plan(NET, (2, 64), optimizer="adamm")),
        ("plan: sharding", lambda: revnets.plan(NET, (2, 64), sharding="zero")),
        ("plan: ranks", lambda: revnets.plan(NET, (2, 64), ranks=0)),
        ("plan: grad_accum", lambda: revnets.plan(NET, (2, 64), grad_accum=0)),
        ("plan: without a budget", lambda: revnets.plan(net, (2, 64)).apply(net)),
    ]


class Counting(nn.Module):
    """Computes a different function in each call."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (x * self.weight).tanh() if self.calls == 1 else x * self.weight


def _in_place(memory: str) -> None:
    """Change weights between forward and backward."""
    net = revnets.ReversibleSequence([nn.Linear(4, 4) for _ in range(4)], memory=memory)
    loss = net(torch.ones(2, 4))[-1].sum()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    loss.backward()


def _unlike() -> None:
    """Run cells whose replay differs from their forward pass."""
    net = revnets.ReversibleSequence([Counting() for _ in range(4)], memory="exact")
    net(torch.ones(2, 4))[-1].sum().backward()


def argument_cases() -> list[Case]:
    """Return invalid arguments of the engine, the audit and the figures."""
    net = revnets.ReversibleSequence([nn.Linear(4, 4) for _ in range(4)])
    x = torch.ones(2, 4)
    wide = revnets.ReversibleSequence([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5)])
    lazy = revnets.ReversibleSequence([nn.LazyLinear(4) for _ in range(3)])
    plain = revnets.ReversibleColumns(
        revnets.wire(4, 2, [[1]] * 2, [0, 0]), [revnets.Cell(nn.Linear(4, 4), None) for _ in range(4)]
    )
    with torch.inference_mode():
        of_inference = torch.ones(2, 4)
    return [
        ("engine: memory mode", lambda: setattr(net, "memory", "fast")),
        ("engine: number of modes", lambda: setattr(net, "memory", ["exact"] * 3)),
        ("engine: number of stored cells", lambda: setattr(net, "stored", 5)),
        ("engine: stored cell", lambda: setattr(net, "stored", [99])),
        ("engine: tap", lambda: net(x, taps=[2])),
        ("engine: stop", lambda: net(x, stop=0)),
        ("engine: number of states", lambda: net.inverse([x], x)),
        ("engine: nothing to invert", lambda: plain.inverse([x, x], x)),
        ("engine: shape of a cell", lambda: wide(x)),
        ("engine: lazy weights", lambda: lazy(x)),
        ("engine: input of inference mode", lambda: net(of_inference)),
        ("engine: number of cells", lambda: revnets.ReversibleColumns(net.graph, net.flat()[:3])),
        ("engine: cells without gain", lambda: revnets.ReversibleColumns(net.graph, plain.flat())),
        ("engine: smallest gain", lambda: Gain(4, min_abs=0)),
        ("engine: gain of 0", lambda: FixedGain(0)),
        ("engine: coupling without gain", lambda: plain.flat()[0](x, couple=torch.add)),
        ("engine: no columns", lambda: find_columns(nn.ModuleDict({"a": nn.Linear(4, 4)}))),
        ("wire: levels", lambda: revnets.wire(4, 1, [["below"]])),
        ("wire: cells", lambda: revnets.wire(0, 2, [["below"]] * 2)),
        ("wire: offset", lambda: revnets.wire(4, 2, [[2]] * 2)),
        ("wire: name", lambda: revnets.wire(4, 2, [["side"]] * 2)),
        ("wire: type", lambda: revnets.wire(4, 2, [[1.0]] * 2)),  # type: ignore[list-item]
        ("wire: replaced", lambda: revnets.wire(9, 3, [["before"]] * 3)),
        ("wire: residuals", lambda: revnets.wire(9, 3, [[1]] * 3, [2, 3, 3])),
        ("audit: memory mode", lambda: revnets.audit(net, x, modes=["exakt"])),
        ("audit: frozen", lambda: revnets.audit(copy.deepcopy(net).requires_grad_(False), x)),
        ("audit: loss", lambda: revnets.audit(net, x, loss=lambda levels: levels[0])),
        ("audit: loss not finite", lambda: revnets.audit(net, x, loss=lambda levels: levels[0].sum() * math.nan)),
        ("figure: labels", lambda: graph_figure(net.graph, ["a"])),
        ("figure: suffix", lambda: save(graph_figure(net.graph), "picture.jpg")),
    ]


def replay_cases() -> list[Case]:
    """Return errors of replays."""
    return [("replay: a weight changed in place", lambda: _in_place("exact")), ("replay: another path", _unlike)]


def command_cases() -> list[Case]:
    """Return invalid options of commands in the working directory."""
    Path("folder").mkdir()
    Path("file").touch()
    return [
        ("command: dtype", lambda: parse_dtype("int8")),
        ("command: a folder", lambda: output.check_place("--png", Path("folder"))),
        ("command: below a file", lambda: output.check_place("--png", Path("file/x.png"))),
        ("command: one name for two", lambda: output.outputs(Path("m.png"), Path("m.png"))),
    ]


def vision_cases(folder: Path) -> list[Case]:
    """Return errors of runs, data, checkpoints and weights."""
    from vision.checkpoints import reader
    from vision.config.data import IdxConfig
    from vision.config.run import load_config
    from vision.data.in_memory import load_idx
    from vision.weights.files import read, select

    run = {"model": str(folder / "net.yaml"), "output": "run"}
    torch.save([1, 2], folder / "list.pt")
    torch.save({"format": 99}, folder / "new.pt")
    torch.save({"model": print}, folder / "code.pt")
    (folder / "text.pt").write_text("no weights\n")
    (folder / "cut.pt").write_bytes((folder / "list.pt").read_bytes()[:200])
    digits = {"model": {"timm": "test_revcol"}, "output": "run"}
    overrides = [
        "epoch=3",
        "optimizer.name=adamww",
        "optimizer.lr=0",
        "schedule.warmup_epochs=30",
        "mixup={prob: 0.5}",
        "data.name=mnist",
        "device=gpu",
        "compile=inductr",
        "checkpoint=sharded",
        "model.timm=revcol_tinny",
    ]
    return [
        *((f"run: {text}", lambda text=text: load_config(digits, [text])) for text in overrides),
        ("run: an odd batch", lambda: load_config(digits, ["batch_size=7", "mixup.mixup_alpha=0.8"])),
        ("run: no such recipe", lambda: load_config("digit")),
        ("run: supervision", lambda: load_config(run, ["supervision={heads: 2}"])),
        ("data: no idx files", lambda: load_idx(IdxConfig(name="idx", root=str(folder)), 0)),
        ("checkpoint: missing", lambda: reader.read(folder / "no.pt")),
        ("checkpoint: of something else", lambda: reader.read(folder / "list.pt")),
        ("checkpoint: another layout", lambda: reader.read(folder / "new.pt")),
        ("checkpoint: more than data", lambda: reader.read(folder / "code.pt")),
        ("checkpoint: cut short", lambda: reader.read(folder / "cut.pt")),
        ("weights: missing", lambda: read(folder / "no.pt")),
        ("weights: a folder", lambda: read(folder)),
        ("weights: refused", lambda: read(folder / "code.pt")),
        ("weights: text", lambda: read(folder / "text.pt")),
        ("weights: of something else", lambda: select({"fc.weight": torch.ones(2)})),
        ("weights: no average", lambda: select({"model": {"subnet0.alpha0": torch.ones(1)}}, "ema")),
    ]


def nlp_cases() -> list[Case]:
    """Return errors of texts and recipes in the working directory."""
    from nlp.data.corpus import Corpus, languages
    from nlp.data.recipe import read_recipe

    Path("a.en").write_text("one\ntwo\n")
    Path("a.de").write_text("eins\n")
    Path("empty.de").write_text("")
    Path("latin.de").write_bytes(b"z\xfcrnt\nzwei\n")
    Path("a.tsv").write_text("one field\n")

    def pairs(*names: str) -> list[Any]:
        return list(Corpus(tuple(Path(name) for name in names)).pairs())

    return [
        ("text: lines", lambda: pairs("a.en", "a.de")),
        ("text: empty", lambda: pairs("a.en", "empty.de")),
        ("text: encoding", lambda: pairs("a.en", "latin.de")),
        ("text: missing", lambda: pairs("a.en", "b.de")),
        ("text: fields", lambda: pairs("a.tsv")),
        ("text: three files", lambda: pairs("a.en", "a.de", "a.fr")),
        ("languages: form", lambda: languages("ende")),
        ("languages: unknown", lambda: languages("en-xx")),
        ("recipe: unknown", lambda: read_recipe(["wmt16_en_dd"], {})),
        ("recipe: no languages", lambda: read_recipe(["a.tsv"], {})),
        ("recipe: no pairs", lambda: read_recipe(["a.tsv"], {"languages": "en-de", "valid": 0})),
    ]


@pytest.mark.usefixtures("own_components")
def test_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.chdir(tmp_path)
    cases = [
        *spec_cases(tmp_path),
        *file_cases(),
        *model_cases(),
        *argument_cases(),
        *replay_cases(),
        *command_cases(),
        *vision_cases(tmp_path),
        *nlp_cases(),
    ]
    entries = []
    for title, action in cases:
        text = entry(title, action, tmp_path)
        for number in range(len(MISTAKES)):  # each mistake has its own directory
            text = text.replace(f"    {number}/net.yaml", "    net.yaml")
        entries.append(text)
    found = "\n".join(entries)
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(found, encoding="utf-8")
    assert found == GOLDEN.read_text(encoding="utf-8")
