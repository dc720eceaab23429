"""The data engine on Fashion-MNIST: whether a student gains from pseudo-labels, and whether duplicates are found.

    apt-get install dataset-fashion-mnist         # Debian and Ubuntu; or any directory with the four idx files: --root
    python examples/data_engine/fashion.py        # 500 of 5,000 images have labels

1. A teacher learns from the labeled images and labels all others. One student learns from the labeled images alone, one
   also from the teacher's labels. Both are the same model and have the same number of updates. Three seeds.
2. The labels that 1, 2 and 4 processes write are compared byte by byte with those of a process that is killed 20 times.
3. Near-duplicates of test images are planted among other images and searched by `revnets duplicates`.

All output is in runs/data_engine. Finished runs are not trained again.
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
from vision.cli.evaluate import evaluate_checkpoint
from vision.config.run import load_config
from vision.data.in_memory import IDX
from vision.errors import EXPECTED, DataError
from vision.labeling.command import label_data
from vision.labeling.local_engine import LabelSettings
from vision.near_duplicates.search import search_duplicates
from vision.near_duplicates.suspects import Limits
from vision.training.trainer import Trainer

REPO = Path(__file__).resolve().parents[2]
OUTPUT = Path(os.path.relpath(REPO / "runs" / "data_engine"))

IMAGES: dict[str, Any] = {"name": "folder", "img_size": 32, "crop_pct": 1.0}
TEACHER_CROPS = {"scale": [0.7, 1.0], "color_jitter": None}
STUDENT_CROPS = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "color_jitter": None}
"""Random crops by area. Students only flip images: in few updates, a student does not fit pseudo-labels of crops."""

MODEL = {"timm": "test_revcol", "dims": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "init": "fast", "memory": "store"}
RUN: dict[str, Any] = {
    "optimizer": {"name": "adamw", "lr": 4.0e-3, "weight_decay": 0.05},
    "schedule": {"name": "cosine", "warmup_updates": 60, "warmup_lr": 1.0e-5, "min_lr": 1.0e-5},
    "clip_grad": 5.0,
    "label_smoothing": 0.1,
    "ema": {"decay": 0.99},
    "device": "cpu",
    "log_every": 100,
}
TEACHER: dict[str, Any] = {**RUN, "model": {**MODEL, "columns": 4, "patch_size": 2}, "batch_size": 32}
TEACHER |= {"mixup": {"mixup_alpha": 0.4}, "label_smoothing": 0.0}
STUDENT: dict[str, Any] = {**RUN, "model": {**MODEL, "columns": 2, "patch_size": 4, "num_classes": 10}}
STUDENT |= {"heads": {"classes": 10}, "batch_size": 64}

LABELED_SHARE = 0.1
"""Share of labeled images in the batches of a student with pseudo-labels."""

SETTINGS = LabelSettings(min_probability=0.01, batch_size=64, shard_size=500)

LIMITS = Limits(distance=0.7, cosine=0.0)
"""Ten classes distinguish few images, so the limit of the label distance is larger than the default."""

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
SEARCHED_TESTS = 1000  # test images that duplicates are searched for


def main(
    root: Annotated[Path, typer.Option(help="Directory with the four idx files.")] = Path(
        "/usr/share/datasets/fashion-mnist"
    ),
    output: Annotated[Path, typer.Option(help="Directory of all output.")] = OUTPUT,
    images: Annotated[int, typer.Option(min=200, max=60000, help="Training images.")] = 5000,
    labels: Annotated[int, typer.Option(min=20, help="Training images that keep their labels.")] = 500,
    test: Annotated[int, typer.Option(min=50, max=10000, help="Test images.")] = 10000,
    updates: Annotated[int, typer.Option(min=61, help="Updates of each student.")] = 1250,
    teacher_updates: Annotated[int, typer.Option(min=61, help="Updates of the teacher.")] = 1200,
    seeds: Annotated[int, typer.Option(min=1, help="Number of teachers, with two students each.")] = 3,
    searched: Annotated[int, typer.Option(min=1, max=60000, help="Images among which duplicates are planted.")] = 2000,
    planted: Annotated[int, typer.Option(min=5, help="Duplicates of test images.")] = 200,
    killed: Annotated[int, typer.Option(min=10, help="Images that interrupted processes label.")] = 1000,
) -> None:
    """Run the data engine on Fashion-MNIST, from raw images to a student, and check its claims."""
    if not any((root / f"{IDX['train'][0]}{ending}").exists() for ending in ("", ".gz")):
        raise DataError(f"{root} has no {IDX['train'][0]}. Install dataset-fashion-mnist, or set --root")
    begun = cpu_seconds()
    torch.set_num_threads(1)
    console = Console()
    if not (output / "data").exists():
        write_images(root, output, images, labels, test)
    accuracy = [students(output, seed, updates, teacher_updates, console) for seed in range(seeds)]
    robustness = robust_labels(output, killed, console)
    found = duplicates(root, output, searched, min(test, SEARCHED_TESTS), planted, console)
    console.print(accuracy_table(accuracy, images, labels, updates))
    minutes = (cpu_seconds() - begun) / 60
    console.print(f"{minutes:.1f} CPU minutes")
    results = {"accuracy": accuracy, "robustness": robustness, "duplicates": found, "cpu_minutes": minutes}
    (output / "results.json").write_text(json.dumps(results, indent=1))


def cpu_seconds() -> float:
    """CPU time of this process and of the processes that it has started."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def students(output: Path, seed: int, updates: int, teacher_updates: int, console: Console) -> dict[str, float]:
    """Test accuracies, in percent: of a teacher, a student with labels alone, and one with pseudo-labels."""
    teacher, alone, student, labels = (output / f"{name}-{seed}" for name in ("teacher", "alone", "student", "labels"))
    classes = {**IMAGES, "root": str(output / "data")}
    accuracy = trained(teacher, {**TEACHER, "data": {**classes, "augment": TEACHER_CROPS}}, teacher_updates, seed)
    found = {"teacher": accuracy}
    label_data(str(teacher), output / "web", labels, SETTINGS, device="cpu", console=console)
    labeled = {**classes, "augment": STUDENT_CROPS, "head": "classes"}
    web = {**IMAGES, "augment": STUDENT_CROPS, "root": str(output / "web"), "labels": str(labels)}
    weighted = [{**labeled, "weight": LABELED_SHARE}, {**web, "weight": 1 - LABELED_SHARE}]
    repeated = [labeled] * 10  # longer epochs, so that fewer checkpoints are written
    found["labels alone"] = trained(alone, {**STUDENT, "data": repeated}, updates, seed)
    found["with pseudo-labels"] = trained(student, {**STUDENT, "data": weighted}, updates, seed)
    console.print(f"seed {seed}: " + ", ".join(f"{name} {value:.2f} %" for name, value in found.items()))
    return found


def trained(folder: Path, config: dict[str, Any], updates: int, seed: int) -> float:
    """Test accuracy of the averaged weights after the last update, in percent; a finished run is not trained again."""
    file = folder / "accuracy.json"
    if not file.exists():
        run = load_config({**config, "updates": updates, "seed": seed, "output": str(folder)})
        last = Trainer(run, Console()).fit().last
        first = config["data"][0] if isinstance(config["data"], list) else config["data"]
        test = {key: value for key, value in first.items() if key != "weight"} | {"val_split": "test"}
        data = [test] if "heads" in config else test
        metrics = evaluate_checkpoint(last or folder, [f"data={json.dumps(data)}", "batch_size=256"])
        file.write_text(json.dumps(metrics["ema"].top1))
    return json.loads(file.read_text())


def accuracy_table(found: list[dict[str, float]], images: int, labels: int, updates: int) -> Table:
    """Test accuracies: one row per seed, and the means."""
    title = f"Test accuracy in %: {labels:,} labels, {images:,} images, {updates:,} updates of each student"
    table = Table(title=title, title_justify="left")
    for heading in ("seed", *found[0], "gain"):
        table.add_column(heading, justify="right")
    mean = {name: statistics.mean(one[name] for one in found) for name in found[0]}
    for name, row in (*((str(seed), one) for seed, one in enumerate(found)), ("mean", mean)):
        gain = row["with pseudo-labels"] - row["labels alone"]
        table.add_row(name, *(f"{value:.2f}" for value in row.values()), f"{gain:+.2f}")
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
        DataError: If one has failed.
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
