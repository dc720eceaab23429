"""Create the files in the directory of this script. It must run with revnets 0.1.0; see README.md."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

import revnets
import vision  # noqa: F401  (registers the models with timm)

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


# --------------------------------------------------------------------------------------------------- commands and files


def run(folder: Path, *words: object, **variables: str) -> str:
    """Return the output of a command of this environment."""
    command = [str(BIN / str(words[0])), *map(str, words[1:])]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT | variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def start(folder: Path, *words: object, size: int = 1) -> list[subprocess.Popen]:
    """Start a command in one process, or in several that train together."""
    command, port = [str(BIN / str(words[0])), *map(str, words[1:])], free_port()
    children = []
    for rank in range(size):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)} if size > 1 else {}
        variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        children.append(
            subprocess.Popen(command, cwd=folder, env=ENVIRONMENT | variables, start_new_session=True, **quiet)
        )
    return children


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def finish(children: Sequence[subprocess.Popen]) -> None:
    assert [child.wait() for child in children] == [0] * len(children)


def stop(children: Sequence[subprocess.Popen], moment: Callable[[], bool], number: int) -> None:
    """Send a signal to processes and their children as soon as `moment()` is true."""
    while not moment():
        assert all(child.poll() is None for child in children), "a process ended too early"
        time.sleep(0.0005)
    for child in children:
        os.killpg(child.pid, number)
    for child in children:
        assert child.wait() in (-number, 128 + number)


def pack(folder: Path, name: str) -> None:
    """Pack a directory, with the times of its files but without user names."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(HERE / f"{name}.tar.xz", "w:xz", preset=9) as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name, filter=plain)


# --------------------------------------------------------------------------------------------- runs of `revnets train`

TINY: dict[str, Any] = {
    "output": "run",
    "model": {
        "columns": 3,
        "stem": {"type": "patchify", "in_chans": 1, "patch": 2},
        "levels": [
            {"dim": 3, "depth": 1, "block": "convnext", "layer_scale": 0.1},
            {"dim": 5, "depth": 1, "block": "convnext", "layer_scale": 0.1},
        ],
        "head": {"type": "classifier", "num_classes": 10},
        "drop_path": 0.2,
    },
    "data": {"name": "digits", "img_size": 8},
    "device": "cpu",
    "seed": 1,
    "epochs": 2,
    "batch_size": 120,
    "grad_accum": 2,  # 5 updates an epoch
    "optimizer": {"name": "adamw", "lr": 0.01},
    "schedule": {"warmup_epochs": 0.5},
    "clip_grad": 1.0,
    "label_smoothing": 0.1,
    "mixup": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    "ema": {"decay": 0.9},
    "log_every": 1,
}

VIT = {
    "columns": 2,
    "stem": {"type": "vision.vit:PatchEmbed", "img_size": 8, "in_chans": 1, "patch": 2},
    "fusion": "linear",
    "levels": [{"dim": 4, "depth": 1, "block": "vision.vit:PostNormBlock", "heads": 2}] * 2,
    "head": {"type": "classifier", "num_classes": 10},
    "drop_path": 0.2,
}

RUNS: dict[str, dict[str, Any]] = {
    "digits": {},
    "shards": {"grad_accum": 1, "parallel": "fsdp", "checkpoint": "sharded", "save_every": 1},
    "revcol_vit": {
        "model": VIT,
        "amp": "bfloat16",
        "optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0.9},
        "clip_grad": None,
        "grad_accum": 1,
        "batch_size": 240,
    },
    "supervised": {
        "model": {
            "timm": "test_revcol",
            "columns": 2,
            "depths": [1, 1, 1, 1],
            "dims": [3, 3, 4, 4],
            "patch_size": 2,
            "drop_path_rate": 0.1,
        },
        "data": {"name": "digits", "img_size": 16},
        "supervision": {"alpha": 1.0},
        "channels_last": True,
        "amp": "float16",
        "mixup": None,
        "ema": None,
    },
}


def make_run(name: str, folder: Path) -> None:
    """Create a run that is stopped in its second epoch, and its result after resuming."""
    (folder / "run.yaml").write_text(yaml.safe_dump(TINY | RUNS[name], sort_keys=False))
    size = 2 if name == "shards" else 1
    run_folder, expected = folder / "run", folder / "expected"
    log, seventh = run_folder / "log.jsonl", run_folder / "checkpoints" / "step-0000007"
    children = start(folder, "revnets", "train", "run.yaml", size=size)
    if name == "shards":
        stop(children, seventh.exists, signal.SIGKILL)
    else:
        stop(children, lambda: log.exists() and '"step": 7' in log.read_text(), signal.SIGTERM)
    steps = sorted(path.stem for path in (run_folder / "checkpoints").glob("step-*"))
    assert "step-0000005" < steps[-1] < "step-0000010", steps
    shutil.rmtree(run_folder / "tensorboard")
    expected.mkdir()
    for passes in (1, 2) if size == 2 else (None,):
        end = expected / ("" if passes is None else "two" if passes == 1 else "one")
        end.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as other:
            shutil.copytree(run_folder, Path(other) / "run")
            changes = ("grad_accum=2", "parallel=ddp", "checkpoint=full") if passes == 2 else ()
            words = ("revnets", "train", "run/config.yaml", *changes)
            finish(start(Path(other), *words, size=2 if passes == 1 else 1))
            final = Path(other) / "run" / "checkpoints" / "step-0000010"
            if passes == 1:
                run(Path(other), "revnets", "reshard", final, end / "final.pt")
            else:
                shutil.copy(final.with_suffix(".pt"), end / "final.pt")
            shutil.copy(Path(other) / "run" / "log.jsonl", end)
    if size == 2:
        run(folder, "revnets", "reshard", Path("run", "checkpoints", steps[-1]), expected / "stopped.pt")
    (folder / "run.yaml").unlink()


# ----------------------------------------------------------------------------------------------------------- weights


def make_weights(folder: Path) -> None:
    """Create the weights of a model in our layout and the official one, with repeated values that compress well."""
    torch.manual_seed(0)
    model = timm.create_model("test_revcol_huge", num_classes=10).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(97)[torch.arange(parameter.numel()) % 97].view_as(parameter)
            is_scale = "gain" in name or "gamma" in name or (name.endswith("weight") and parameter.ndim == 1)
            parameter.copy_(0.5 + 0.2 * values if is_scale else values * parameter[0].numel() ** -0.5)
    save_file(model.state_dict(), folder / "model.safetensors")
    run(folder, "revnets", "convert", "model.safetensors", "official.pth")
    run(folder, "revnets", "convert", "official.pth", "ours.safetensors")
    (folder / "model.safetensors").unlink()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.save({"image": image, "logits": model(image)}, folder / "expected.pt")


# -------------------------------------------------------------------------------------------------------- translation

PREPARE = ("revnets", "prepare-mt", "table.tsv", "-l", "en-de", "-o", "bin", "--valid", "9", "--test", "11")
PREPARE += ("--merges", "40", "--workers", "1")


def make_prepared(folder: Path) -> None:
    """Create data of `revnets prepare-mt`: complete, and from processes killed between two steps."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
    lines = [rng.choices(words, k=rng.randint(3, 9)) for _ in range(160)]
    pairs = [(f"{' '.join(line)}.".capitalize(), f"{' '.join(word[::-1] for word in line)}.") for line in lines]
    table = folder / "table.tsv"
    table.write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    os.utime(table, ns=(TIME, TIME))
    for name, done, ahead in (("tokens", "tokens", "codes"), ("units", "units", "")):
        while True:
            work = folder / "bin.work"
            stop(start(folder, *PREPARE), (work / done / "prepared.json").exists, signal.SIGKILL)
            if not ahead or not (work / ahead).exists():
                break
            shutil.rmtree(work)
        (folder / f"killed_after_{name}").mkdir()
        for path in folder.glob("*bin*"):  # incomplete files start with a dot
            path.rename(folder / f"killed_after_{name}" / path.name)
    run(folder, *PREPARE)
    (folder / "bin" / "preprocess.log").unlink(missing_ok=True)
    for note in folder.rglob("prepared.json"):
        note.write_text(note.read_text().replace(str(folder), "FOLDER"))


TIME = 1_700_000_000_000_000_000
"""Modification time of the table, which its prepared data record."""

MODEL = ("--encoder-embed-dim", "8", "--encoder-ffn-embed-dim", "12", "--encoder-attention-heads", "2")
MODEL += ("--decoder-embed-dim", "8", "--decoder-ffn-embed-dim", "12", "--decoder-attention-heads", "2")
MODEL += ("--decoder-layers", "1", "--share-all-embeddings", "--dropout", "0.1")
TRAIN = ("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr", "0.005", "--lr-scheduler", "inverse_sqrt")
TRAIN += ("--warmup-updates", "40", "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1")
TRAIN += ("--max-tokens", "120", "--cpu", "--num-workers", "0", "--disable-validation", "--no-epoch-checkpoints")
TRAIN += ("--save-interval-updates", "2", "--keep-interval-updates", "2", "--no-progress-bar")
LEARNING = ("--lr", "0.03", "--warmup-updates", "5", "--max-update", "40")
GENERATE = ("--beam", "2", "--max-len-b", "9", "--required-batch-size-multiple", "1")
NET = """\
columns: 2
levels:
  - {dim: 8, depth: 1, block: transformer, heads: 2}
  - {dim: 8, depth: 1, block: mlp}
"""


def make_translation(folder: Path, prepared: Path) -> None:
    """Create fairseq checkpoints: of a model from options, and of a model from a file."""
    shutil.copytree(prepared / "bin", folder / "bin")
    (folder / "nlp").symlink_to(run(folder, "revnets", "user-dir").strip().splitlines()[-1])
    train = ("fairseq-train", "bin", "--user-dir", "nlp", "--arch", "revcol_transformer", *MODEL, *TRAIN)
    options = ("--revcol-columns", "2", "--revcol-blocks", "1,1")
    run(folder, *train, "--save-dir", "saved", *options, "--max-update", "4")
    expected = folder / "expected"
    expected.mkdir()
    run(folder, "revnets", "average-checkpoints", "saved", "--updates", "--last", "2", "-o", "expected/average.pt")
    shutil.copytree(folder / "saved", folder / "other")
    run(folder, *train, "--save-dir", "other", *options, "--max-update", "8")
    shutil.copy(folder / "other" / "checkpoint_last.pt", expected / "final.pt")
    shutil.rmtree(folder / "other")

    (folder / "net.yaml").write_text(NET)
    run(folder, *train, "--save-dir", "from_file", "--revcol-spec", "net.yaml", *LEARNING)
    for path in (folder / "from_file").glob("checkpoint_1_*.pt"):
        path.unlink()
    (folder / "net.yaml").unlink()
    generate = ("fairseq-generate", "bin", "--user-dir", "nlp", "--path", "from_file/checkpoint_last.pt", "--cpu")
    run(folder, *generate, *GENERATE, "--results-path", "generated")
    shutil.copy(folder / "generated" / "generate-test.txt", expected)
    shutil.rmtree(folder / "generated")
    shutil.rmtree(folder / "bin")
    (folder / "nlp").unlink()


# ----------------------------------------------------------------------------------------------------------- networks

NETS: dict[str, dict[str, Any]] = {
    "convnext": {
        "columns": 3,
        "stem": {"type": "patchify", "patch": 2},
        "levels": [
            {"dim": 4, "depth": 1, "block": "convnext", "layer_scale": 0.5, "reads": ["below", "above", "top"]},
            {"dim": 6, "depth": 2, "block": "convnext", "layer_scale": 0.5, "kernel_size": 5},
            {"dim": 6, "depth": 1, "block": "mlp"},
        ],
        "drop_path": 0.3,
        "taps": [0],
        "head": {"type": "classifier", "num_classes": 3, "dropout": 0.2},
    },
    "tokens": {
        "columns": 3,
        "stem": {"type": "tokens", "img_size": 8, "patch": 4},
        "fusion": "linear",
        "levels": [
            {"dim": 4, "depth": 1, "block": "vit", "heads": 2},
            {"dim": 6, "depth": 2, "block": "vit", "heads": 2, "dropout": 0.1},
        ],
        "gain": {"init": -0.7},
        "head": {"type": "classifier", "num_classes": 3},
    },
    "revnet": {
        "columns": 1,
        "stem": {"type": "patchify", "patch": 1},
        "fusion": {"type": "convnext", "stepwise": True},
        "reads": [1],
        "residual": 2,
        "gain": {"init": 1.0, "learn": False},
        "levels": [
            {"dim": 4, "depth": 0, "block": "convnext", "stride": 1, "reads": ["stem"]},
            {"dim": 4, "depth": 0, "block": "convnext", "stride": 1, "reads": ["stem"]},
            *[{"dim": 4, "depth": 1, "block": "convnext", "shortcut": False, "stride": 1, "layer_scale": 0.5}] * 2,
            {"dim": 6, "depth": 0, "block": "convnext", "stride": 4, "reads": [2], "residual": 0},
            {"dim": 6, "depth": 0, "block": "convnext", "stride": 1, "reads": [2], "residual": 0},
            *[{"dim": 6, "depth": 1, "block": "convnext", "shortcut": False, "stride": 1, "layer_scale": 0.5}] * 2,
        ],
    },
    "vectors": {
        "columns": 3,
        "stem": {"type": "linear", "in_dim": 8},
        "fusion": "identity",
        "reads": "full",
        "levels": [{"dim": 4, "depth": 1, "block": "mlp", "expand": 2, "dropout": 0.1}] * 3,
    },
    "revcol_vit": {
        "columns": 3,
        "stem": {"type": "vision.vit:PatchEmbed", "img_size": 8, "patch": 2},
        "fusion": {"type": "linear", "project": ["above"], "norm": False},
        "levels": [{"dim": 4, "depth": 1, "block": "vision.vit:PostNormBlock", "heads": 2}] * 2,
        "head": {"type": "classifier", "num_classes": 3},
    },
}


class OfSum(nn.Sequential):
    """Applies modules in sequence to the sum of the inputs."""

    def forward(self, *reads: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.stack(reads).sum(0))


def sequence() -> revnets.ReversibleSequence:
    functions = [OfSum(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1)) for _ in range(7)]
    return revnets.ReversibleSequence(functions, m=3, reads=(1, 2), gain=0.7)


def make_nets(folder: Path) -> None:
    """Create networks with a fixed seed, and their outputs and gradients in `memory: exact`."""
    for name, spec in {**NETS, "sequence": {}}.items():
        (folder / name).mkdir()
        torch.manual_seed(0)
        net = revnets.build(spec) if spec else sequence()
        if spec:
            (folder / name / "net.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
        torch.save(net.state_dict(), folder / name / "state.pt")
        x = torch.randn((2, 3, 8, 8) if name not in ("vectors", "sequence") else (2, 8)).requires_grad_()
        torch.manual_seed(1)  # for dropout
        out = tensors(net(x))
        sum((part * part.detach().cos()).sum() for part in out).backward()
        grads = {key: parameter.grad for key, parameter in net.named_parameters()}
        found = {"x": x.detach(), "out": [part.detach() for part in out], "grads": grads, "x_grad": x.grad}
        torch.save(found, folder / name / "expected.pt")


def tensors(out: Any) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else [tensor for part in out for tensor in tensors(part)]


# -------------------------------------------------------------------------------------------------------------- probe


def make_probe() -> None:
    """Create the result of a calculation that other kernels round differently; then all results may differ."""
    torch.manual_seed(0)
    x, weight, kernel = torch.randn(1, 12, 12, 12), torch.randn(12, 48), torch.randn(12, 1, 3, 3)
    given = {"x": x, "weight": weight, "kernel": kernel}
    torch.save({"torch": str(torch.__version__), "given": given, "result": probe(**given)}, HERE / "probe.pt")


def probe(x: torch.Tensor, weight: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    x = torch.nn.functional.conv2d(x, kernel, padding=1, groups=12).permute(0, 2, 3, 1)
    x = torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, (12,)) @ weight) @ weight.T
    return torch.nn.functional.scaled_dot_product_attention(x, x.softmax(-1), x.exp().log1p())


def main() -> None:
    assert revnets.__version__ == "0.1.0", revnets.__version__
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or ["probe", "nets", "weights", *RUNS, "prepared", "translation"]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for wish in wanted:
            if wish == "probe":
                make_probe()
                continue
            (folder := root / wish).mkdir()
            if wish in RUNS:
                make_run(wish, folder)
            elif wish == "prepared":
                make_prepared(folder)
            elif wish == "translation":
                make_translation(folder, root / "prepared")
            else:
                {"nets": make_nets, "weights": make_weights}[wish](folder)
            pack(folder, wish)
            print(wish, (HERE / f"{wish}.tar.xz").stat().st_size, flush=True)


if __name__ == "__main__":
    main()
