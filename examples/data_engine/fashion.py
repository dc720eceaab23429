"""The data engine on Fashion-MNIST: does a student profit from pseudo-labels, and are planted duplicates found?

    apt-get install dataset-fashion-mnist         # Debian and Ubuntu; or any folder with the four idx files: --root
    python examples/data_engine/fashion.py                        # a tenth of 12,000 images has labels
    python examples/data_engine/fashion.py --images 60000         # of all images; five times as long

1. A teacher learns from the labeled tenth and labels the other images. A student learns from both in as many updates as
   the teacher. Three seeds.
2. Labels that 1, 2 and 4 processes write, and those of a process that is killed 20 times, are compared byte by byte.
3. Near-duplicates of test images are planted among other images and searched by `revnets duplicates`.

Everything is in runs/data_engine. Finished runs are not trained again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from fashion_images import CHANGES, write_images, write_planted
from rich.console import Console
from rich.table import Table

from revnets import SpecError
from vision.config.run import load_config
from vision.data.in_memory import IDX
from vision.errors import EXPECTED, DataError
from vision.labeling.command import label_data
from vision.labeling.local_engine import LabelSettings
from vision.near_duplicates.search import search_duplicates
from vision.near_duplicates.suspects import Limits
from vision.training.run_log import LOG, read_log
from vision.training.trainer import Trainer

REPO = Path(__file__).resolve().parents[2]
OUTPUT = Path(os.path.relpath(REPO / "runs" / "data_engine"))

IMAGES = {"name": "folder", "img_size": 32, "crop_pct": 1.0, "augment": {"scale": [0.6, 1.0], "color_jitter": None}}
RUN: dict[str, Any] = {
    "model": {"timm": "test_revcol", "columns": 2, "patch_size": 4, "dims": [16, 32, 64, 128], "num_classes": 10},
    "heads": {"classes": 10},
    "batch_size": 32,
    "optimizer": {"name": "adamw", "lr": 4.0e-3, "weight_decay": 0.05},
    "schedule": {"name": "cosine", "warmup_epochs": 0.5, "warmup_lr": 1.0e-5, "min_lr": 1.0e-5},
    "clip_grad": 5.0,
    "device": "cpu",
    "log_every": 100,
}
SETTINGS = LabelSettings(min_probability=0.01, batch_size=64, shard_size=500)

LIMITS = Limits(distance=0.7, cosine=0.0)
"""Ten classes tell few images apart, so that labels may be further apart than by default."""

LABEL = """
import sys
from pathlib import Path
import torch
from rich.console import Console
from vision.labeling.command import label_data
from vision.labeling.local_engine import LabelSettings
torch.set_num_threads(1)
settings = LabelSettings(min_probability=0.01, batch_size=64, shard_size=25)
label_data(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), settings, device="cpu", console=Console(quiet=True))
"""

KILLS, WORKERS = 20, (1, 2, 4)


def main(
    root: Annotated[Path, typer.Option(help="Folder with the four idx files.")] = Path(
        "/usr/share/datasets/fashion-mnist"
    ),
    output: Annotated[Path, typer.Option(help="Folder of everything.")] = OUTPUT,
    images: Annotated[int, typer.Option(min=100, max=60000, help="Training images; a tenth keeps its labels.")] = 12000,
    test: Annotated[int, typer.Option(min=100, max=10000, help="Test images.")] = 2000,
    epochs: Annotated[int, typer.Option(min=1, help="Of the student; the teacher has as many updates.")] = 3,
    seeds: Annotated[int, typer.Option(min=1, help="How many teachers and students.")] = 3,
    searched: Annotated[int, typer.Option(min=1, max=60000, help="Images in which duplicates are planted.")] = 2000,
    planted: Annotated[int, typer.Option(min=5, help="Duplicates of test images.")] = 200,
    killed: Annotated[int, typer.Option(min=10, help="Images that killed processes label.")] = 1000,
) -> None:
    """Run the data engine on Fashion-MNIST, from raw images to a student, and check what it claims."""
    if not any((root / f"{IDX['train'][0]}{ending}").exists() for ending in ("", ".gz")):
        raise DataError(f"{root} has no {IDX['train'][0]}. Install dataset-fashion-mnist, or give --root")
    torch.set_num_threads(1)
    console = Console()
    if not (output / "data").exists():
        write_images(root, output, images // 10, images - images // 10, test)
    accuracy = [students(output, seed, epochs, console) for seed in range(seeds)]
    robustness = robust_labels(output, killed, console)
    found = duplicates(root, output, searched, test, planted, console)
    console.print(accuracy_table(accuracy, images, epochs))
    results = {"accuracy": accuracy, "robustness": robustness, "duplicates": found}
    (output / "results.json").write_text(json.dumps(results, indent=1))


def students(output: Path, seed: int, epochs: int, console: Console) -> tuple[float, float]:
    """Test accuracies, in percent, of a teacher that learned from labels alone and of its student."""
    teacher, student, labels = (output / f"{name}-{seed}" for name in ("teacher", "student", "labels"))
    labeled = {**IMAGES, "root": str(output / "data"), "head": "classes"}
    first = trained(teacher, [labeled], 10 * epochs, seed, console)
    label_data(str(teacher), output / "web", labels, SETTINGS, device="cpu", console=console)
    web = {**IMAGES, "root": str(output / "web"), "labels": str(labels)}
    return first, trained(student, [labeled, web], epochs, seed, console)


def trained(folder: Path, data: list[dict[str, Any]], epochs: int, seed: int, console: Console) -> float:
    """The accuracy of a run after its last epoch, in percent; a finished run is read from its log."""
    config = load_config({**RUN, "data": data, "epochs": epochs, "seed": seed, "output": str(folder)})
    if not (folder / "finished").exists():
        Trainer(config, console).fit()
        (folder / "finished").touch()
    return [line for line in read_log(folder / LOG) if line["kind"] == "eval"][-1]["raw_top1"]


def accuracy_table(found: list[tuple[float, float]], images: int, epochs: int) -> Table:
    """A row a seed, and the means."""
    table = Table(title=f"Test accuracy, {images // 10:,} labels, {images:,} images x {epochs}", title_justify="left")
    for heading in ("seed", "labels alone", "and pseudo-labels", "gain"):
        table.add_column(heading, justify="right")
    rows = [(str(seed), *pair) for seed, pair in enumerate(found)]
    for name, first, second in (*rows, ("mean", *(statistics.mean(values) for values in zip(*found, strict=True)))):
        table.add_row(name, f"{first:.2f}", f"{second:.2f}", f"{second - first:+.2f}")
    return table


def robust_labels(output: Path, count: int, console: Console) -> dict[str, Any]:
    """Label some images by several processes, and by one that is killed again and again; compare the files."""
    some, folder = output / "some", output / "robust"
    for path in sorted((output / "web").rglob("*.png"))[:count]:
        (some / path.name).parent.mkdir(exist_ok=True)
        shutil.copy(path, some / path.name)
    shutil.rmtree(folder, ignore_errors=True)
    seconds, contents = {}, {}
    for workers in WORKERS:
        begun = time.monotonic()
        ended([started(output, some, folder / str(workers)) for _ in range(workers)])
        seconds[workers], contents[workers] = time.monotonic() - begun, files_in(folder / str(workers))
    draws, at_kills = random.Random(0), []
    for _ in range(KILLS):
        before, process = len(files_in(folder / "killed")), started(output, some, folder / "killed")
        while len(files_in(folder / "killed")) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draws.uniform(0, 0.1))  # about as long as a file takes
        if process.poll() is None:
            process.kill()
            process.wait()
            at_kills.append(len(files_in(folder / "killed")))
    ended([started(output, some, folder / "killed")])
    contents["killed"] = files_in(folder / "killed")
    equal = all(files == contents[1] for files in contents.values())
    if not equal:
        raise DataError("labels differ between numbers of processes, or after kills")
    console.print(
        f"{len(contents[1])} files of {count} images: equal for {', '.join(map(str, WORKERS))} processes and after "
        f"{len(at_kills)} kills, at which {', '.join(map(str, at_kills))} files were finished"
    )
    return {"seconds": seconds, "finished_at_kills": at_kills}


def started(output: Path, images: Path, folder: Path) -> subprocess.Popen[bytes]:
    """A process that labels images with the first teacher."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    words = [str(output / "teacher-0"), str(images), str(folder)]
    return subprocess.Popen([sys.executable, "-c", LABEL, *words], env=environment)


def ended(processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait for processes.

    Raises:
        DataError: one has failed.
    """
    if any([process.wait() for process in processes]):
        raise DataError("a process that labels images has failed")


def files_in(folder: Path) -> dict[str, bytes]:
    """The label files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*.parquet"))}


def duplicates(root: Path, output: Path, searched: int, test: int, planted: int, console: Console) -> dict[str, Any]:
    """Plant near-duplicates, search them, and count: by kind, and what was found that is none of them."""
    pairs = write_planted(root, output, searched, test, min(planted, test))
    labels = output / "searched-labels"
    shutil.rmtree(labels, ignore_errors=True)
    label_data(str(output / "teacher-0"), output / "searched", labels, SETTINGS, device="cpu", console=console)
    begun = time.process_time()
    found = search_duplicates(
        labels,
        output / "against",
        output / "suspects.parquet",
        output / "sheet.png",
        limits=LIMITS,
        device="cpu",
        console=console,
    )
    seconds = time.process_time() - begun
    right = {suspect.key for suspect in found if pairs.get(suspect.key) == suspect.against}
    wrong = {suspect.key for suspect in found} - set(pairs)
    recall = {kind: share(right, [key for key in pairs if key.startswith(kind)]) for kind in CHANGES}
    recall["all"] = share(right, list(pairs))
    precision = len(right) / max(1, len(right | wrong))
    title = f"{len(pairs)} planted among {searched:,} images, {test:,} test images; {seconds:.0f} CPU seconds"
    table = Table("", "found, %", title=title, title_justify="left")
    for kind, value in {**recall, "precision": precision}.items():
        table.add_row(kind, f"{100 * value:.1f}")
    console.print(table)
    return {"recall": recall, "precision": precision, "others": sorted(wrong), "cpu_seconds": seconds}


def share(found: set[str], keys: list[str]) -> float:
    """Which part of the keys was found."""
    return sum(key in found for key in keys) / max(1, len(keys))


if __name__ == "__main__":
    try:
        typer.run(main)
    except (SpecError, OSError, *EXPECTED) as error:
        raise SystemExit(f"error: {error}") from error
