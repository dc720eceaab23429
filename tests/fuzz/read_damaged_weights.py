"""Read damaged weight files with every reader in bounded memory. test_damaged_weights.py runs this.

    python -m tests.fuzz.read_damaged_weights FOLDER COUNT

Prints a line of JSON per kind of file: the count of each outcome, and unexpected ones.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import shutil
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

from nlp.data.corpus import TranslationError
from nlp.evaluation.checkpoint_averaging import average
from revnets import SpecError
from revnets.analysis.gains import lost_bits, read_gains
from tests.fuzz import mutations
from tests.support.training_runs import TINY, tiny
from vision.checkpoints import manager, reader, reshard
from vision.checkpoints.layout import TO_RESUME
from vision.config.run import load_config
from vision.data.dataset import ImageData
from vision.distributed.context import World
from vision.errors import CheckpointError
from vision.models.architecture import RevCol
from vision.training.loaded_run import load_run
from vision.training.train_state import TrainState
from vision.weights import convert, files, finetune, recognition

MEMORY = 2**30
"""Bytes that reading may allocate in addition."""

EXPECTED = (CheckpointError, TranslationError, SpecError)


class Readers:
    """All readers of weight files: one method per command or function of the packages.

    Args:
        folder: Directory for their output.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        model = {**TINY["model"], "columns": 2}
        self.config = load_config(tiny(folder / "run", model=model, mixup=None))
        classes = tuple(str(digit) for digit in range(10))
        data = ImageData(None, None, classes, (1, 8, 8), (0.0,), (1.0,))  # type: ignore[arg-type]
        self.state = TrainState(self.config, data, 5)

    def content(self) -> dict[str, Any]:
        """Return a checkpoint of a run after its third update."""
        batch = (torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))
        for step in range(1, 3):
            self.state.update(iter([batch] * 2), step)
        progress = {"epoch": 0, "step": 2, "best": -1.0, "best_step": -1, "losses": torch.ones(2, dtype=torch.float64)}
        return {
            "format": manager.FORMAT,
            "versions": manager.versions(),
            "config": self.config.plain(),
            "world": 1,
            "classes": [str(digit) for digit in range(10)],
            "progress": progress,
            **self.state.state(),
        }

    def evaluation(self, path: Path) -> None:
        run = load_run(path)
        with torch.inference_mode():
            run.model(torch.zeros(1, 1, 8, 8))

    def resumption(self, path: Path) -> None:
        state = reader.read(path, World(), TO_RESUME)
        self.state.load_state(state, path)
        self.state.update(iter([(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))] * 2), 3)

    def resharding(self, path: Path) -> None:
        target = self.folder / "resharded"
        reshard.reshard(path, target, 0 if path.is_dir() else 2)
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    def pretrained(self, path: Path) -> None:
        content, name = finetune.find_pretrained(str(path), World())
        finetune.fitted(files.tensors_in(content, "raw", name), self.state.model, name)
        finetune.class_names_in(content)

    def released(self, path: Path) -> None:
        net().load_pretrained(str(path))

    def conversion(self, path: Path) -> None:
        found = files.select(files.read(path), "raw", path)
        with_names, _ = convert.skeleton(found, net().spec)
        convert.ours_of(found, convert.names_in(found, with_names), (), path, "net")
        convert.convert(found, path=path)

    def gains(self, path: Path) -> None:
        for cell in read_gains(str(path)):
            lost_bits(cell.gamma, 64)

    def averaging(self, path: Path) -> None:
        average([path, path], self.folder / "average.pt")


def net(device: str | None = None) -> RevCol:
    """Return a small RevCol with official names."""
    from revnets import load_spec

    levels = [f"levels.{index}.{key}={value}" for index in range(4) for key, value in (("dim", 4), ("depth", 1))]
    return RevCol(load_spec(recognition.MODELS / "revcol_tiny.yaml", ["columns=2", *levels]), 3, 3, device=device)


def official() -> dict[str, Any]:
    """Return a checkpoint of the official trainer."""
    from vision.weights.official_names import names_of, to_official

    model = net()
    state = to_official(dict(model.state_dict()), names_of(model))
    return {"model": state, "state_dict_ema": state, "max_accuracy": 81.5, "epoch": 3, "optimizer": {"state": {}}}


def fairseq() -> dict[str, Any]:
    """Return a checkpoint of fairseq."""
    import numpy as np

    return {
        "args": None,
        "cfg": {"model": argparse.Namespace(arch="revcol_transformer_tiny", seed=1)},
        "model": {"encoder.weight": torch.randn(7, 5), "encoder.version": torch.tensor([3.0])},
        "optimizer_history": [{"best_loss": np.float64(2.5), "num_updates": 3}],
        "extra_state": {"epoch": 1, "counts": np.arange(3), "meters": [("loss", {"sum": 1.0})]},
        "last_optimizer_state": {"exp_avg": torch.ones(7)},
    }


def saved(content: Any, is_zip: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=is_zip)
    return file.getvalue()


Damage = Callable[[Path, random.Random], None]
Reader = Callable[[Path], None]


def kinds(readers: Readers) -> Iterator[tuple[str, Path, list[Damage], list[Reader]]]:
    """Return the kinds of files: name, path of a damaged file, mutations and reader."""
    r, folder = readers, readers.folder
    run, ours = r.content(), [r.evaluation, r.resumption, r.resharding, r.pretrained, r.gains]
    yield "run", folder / "run.pt", _zip_damages(run), ours
    yield "legacy", folder / "legacy.pt", _damages(run, is_zip=False), ours
    yield "official", folder / "official.pth", _zip_damages(official()), [r.released, r.conversion, r.gains]
    yield "fairseq", folder / "fairseq.pt", _zip_damages(fairseq()), [r.averaging, r.gains]
    tensors = save_safetensors(dict(net().state_dict()))
    headers: list[Damage] = [_written(lambda g, change=change: change(tensors, g)) for change in HEADERS]
    yield "safetensors", folder / "ours.safetensors", headers, [r.released, r.conversion, r.gains]
    (folder / "whole.pt").write_bytes(saved(run))
    reshard.reshard(folder / "whole.pt", folder / "whole", 2)
    yield "shards", folder / "shards", [damage_shards], [r.evaluation, r.resumption, r.resharding, r.pretrained]


HEADERS = (mutations.damaged, mutations.with_other_header)


def _written(make: Callable[[random.Random], bytes]) -> Damage:
    def write(path: Path, generator: random.Random) -> None:
        path.write_bytes(make(generator))

    return write


def _damages(content: Any, is_zip: bool) -> list[Damage]:
    data = saved(content, is_zip)
    other_value = _written(lambda generator: saved(mutations.with_other_value(content, generator), is_zip))
    return [_written(lambda generator: mutations.damaged(data, generator)), other_value, other_value]


def _zip_damages(content: Any) -> list[Damage]:
    data = saved(content)
    changes = (mutations.with_other_pickle, mutations.with_other_entries)
    return [
        *_damages(content, is_zip=True),
        *(_written(lambda g, change=change: change(data, g)) for change in changes),
    ]


def damage_shards(folder: Path, generator: random.Random) -> None:
    """Return a sharded checkpoint with one file that is damaged, of another kind, missing or swapped."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folder.with_name("whole"), folder)
    name, other = generator.sample(sorted(path.name for path in folder.iterdir()), 2)
    kind = generator.randrange(5)
    if kind == 0:
        (folder / name).unlink()
    elif kind == 1:
        shutil.copyfile(folder / name, folder / other)
    elif kind == 2:
        (folder / name).write_bytes(mutations.damaged((folder / name).read_bytes(), generator))
    else:
        content = torch.load(folder / name, weights_only=True)
        (folder / name).write_bytes(saved(mutations.with_other_value(content, generator)))


def limit_memory() -> None:
    """Limit this process to `MEMORY` more than it uses now."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)


def try_out(path: Path, damages: list[Damage], using: list[Reader], generator: random.Random, count: int) -> Any:
    """Read `count` damaged files."""
    outcomes, wrong = Counter[str](), []
    for number in range(count):
        damages[number % len(damages)](path, generator)
        read = using[generator.randrange(len(using))]
        try:
            read(path)
            outcomes["read"] += 1
        except EXPECTED as error:
            outcomes[error.code] += 1
            is_named = isinstance(error, SpecError) or path.stem in str(error)
            if not is_named or not str(error).isprintable():
                wrong.append(f"{number} {read.__name__}: {error!r}")
        except Exception as error:  # a traceback for the user
            place = traceback.extract_tb(error.__traceback__)[-1]
            wrong.append(f"{number} {read.__name__}: {error!r} at {place.filename}:{place.lineno}")
    return {"outcomes": outcomes, "wrong": wrong}


def main(folder: Path, count: int) -> None:
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    is_limited = False
    for name, path, damages, using in kinds(Readers(folder)):
        if not is_limited:
            (folder / "good.pt").write_bytes(saved(official()))  # imports of the first call do not count
            net().load_pretrained(str(folder / "good.pt"))
            limit_memory()
            is_limited = True
        found = try_out(path, damages, using, random.Random(name), count)
        print(json.dumps({"kind": name, **found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
