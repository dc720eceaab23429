"""The command `revnets duplicates`: reads, labels and compares images, and writes the reports."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from revnets.cli.output import progress
from revnets.config.errors import option_error
from vision.labeling.local_engine import LabelSettings, label_images, provenance_of
from vision.labeling.origin import Origin, read_origin
from vision.labeling.shards import list_shards
from vision.labeling.teacher import Teacher, load_teacher
from vision.labeling.work_queue import WorkQueue
from vision.near_duplicates.contact_sheet import contact_sheet, save_sheet
from vision.near_duplicates.features import TeacherFeatures, has_features
from vision.near_duplicates.pictures import Pictures, pictures_of
from vision.near_duplicates.report import suspects_table, write_suspects
from vision.near_duplicates.suspects import LabeledSet, Limits, Suspect, find_suspects
from vision.pseudo_labels.label_files import LabelFolder, read_labels


def search_duplicates(
    folder: Path,
    against: Path,
    output: Path,
    png: Path | None = None,
    images: Path | None = None,
    against_images: Path | None = None,
    teacher: str | None = None,
    limits: Limits | None = None,
    by: Literal["labels", "features"] = "labels",
    device: str = "auto",
    trust: bool = False,
    console: Console | None = None,
) -> list[Suspect]:
    """Find near-duplicates and report them. Nothing is deleted.

    Args:
        folder: Labels of the images that may be duplicates.
        against: Labels of the other images, or images, which the teacher labels first. The same directory as `folder`
            finds duplicates within the set.
        output: Parquet file of the suspects. A list of keys is written next to it.
        png: Contact sheet.
        images, against_images: the labeled images; by default at their path when they were labeled.
        teacher: Of the labels; by default at its path when it labeled. It is loaded if its labels or features are
            needed.
        limits: How similar the images of a pair must be.
        by: Whether candidates are pairs with similar labels, or with similar features.
        device: Of the teacher.
        trust: Whether the configuration in a checkpoint may name classes of other projects.
        console: For progress and results.

    Raises:
        revnets.SpecError: If labels, images or teacher cannot be used or do not match.
        OSError: If a file cannot be written.
    """
    console = console or Console()
    labels = read_labels(folder)
    origin = read_origin(folder)
    source = teacher or (origin.teacher if origin else None)
    endings = origin.input_key if origin else None
    loaded = None
    if source is not None and (teacher is not None or by == "features" or not _is_labels(against)):
        loaded = load_teacher(source, device, trust=trust)
        if loaded.digest != labels.provenance.teacher:
            problem = f"the weights of {source} differ from those of the teacher of {folder}"
            raise option_error("--teacher", problem, "Give the teacher of the labels", code="weights-mismatch")
    copies = _pictures(labels, images, origin, "--images", loaded)
    with _labels_of(against, labels, loaded, endings, console) as others:
        place = None if _is_labels(against) else Origin("", str(against), endings)
        originals = _pictures(others, against_images, place or read_origin(against), "--against-images", loaded)
        if copies is None or originals is None:
            missing = "--images" if copies is None else "--against-images"
            if png is not None:
                raise option_error("--png", "a contact sheet needs the images", f"Give {missing}", code="missing-key")
            _say(
                console, f"The images are not available, so only labels are compared. To compare images, add {missing}"
            )
            copies = originals = None
        features = None
        if loaded is not None and copies is not None:
            if has_features(loaded):
                features = TeacherFeatures(loaded)
            else:
                _say(console, f"The model of {source} has no forward_head, so features are not compared")
        with progress(console, labels.rows) as (tell, advance):
            tell("images")

            def done(count: int) -> None:
                for _ in range(count):
                    advance()

            found = find_suspects(
                LabeledSet(labels, copies), LabeledSet(others, originals), limits or Limits(), features, by, done
            )
    console.print(suspects_table(found))
    _say_unreadable(console, {"--images": copies, "--against-images": originals})
    keys = write_suspects(found, output)
    if png is not None and copies is not None and originals is not None:
        save_sheet(contact_sheet(found, copies, originals), png)
        _say(console, f"wrote {png}")
    _say(console, f"wrote {output} and {keys}; to exclude these images from training, set data.exclude={keys}")
    return found


def _is_labels(path: Path) -> bool:
    return path.is_dir() and any(path.glob("part-*.parquet"))


@contextmanager
def _labels_of(
    against: Path, labels: LabelFolder, teacher: Teacher | None, endings: str | None, console: Console
) -> Iterator[LabelFolder]:
    """The labels of the other images: those in a directory, or new ones, which are deleted after the `with` block."""
    if _is_labels(against):
        others = read_labels(against)
        if others.provenance.teacher != labels.provenance.teacher:
            problem = f"{against} has labels of another teacher than {labels.path}"
            raise option_error("--against", problem, "Label both with the same teacher", code="settings-differ")
        yield others
        return
    if not against.exists():
        problem = f"there is no file or directory {against}"
        raise option_error("--against", problem, "Give labels, or images to label", code="missing-file")
    if teacher is None:
        problem = f"{against} has no labels, and the path of the teacher is unknown"
        raise option_error("--teacher", problem, "Give the teacher of the labels", code="missing-key")
    minimum = labels.provenance.settings.get("min_probability")
    if not isinstance(minimum, float | int) or not 0 <= minimum < 1:
        problem = f"{labels.path} does not state the minimum of stored probabilities"
        raise option_error("FOLDER", problem, "Label the images again", code="damaged-file")
    settings = LabelSettings(min_probability=float(minimum), input_key=endings)
    there = list_shards(against, settings.shard_size, endings)
    with tempfile.TemporaryDirectory(prefix="revnets-labels-") as place:
        queue = WorkQueue(Path(place), there.shards, provenance_of(teacher, there, settings))
        _say(console, f"labeling {len(there.reader)} images of {against}")
        label_images(teacher, there, queue, settings, say=lambda text: _say(console, text))
        yield read_labels(place)


def _pictures(
    labels: LabelFolder, given: Path | None, origin: Origin | None, option: str, teacher: Teacher | None
) -> Pictures | None:
    """The images of labels: at the given path, or at their path when they were labeled."""
    endings, exif = origin.input_key if origin else None, teacher.exif if teacher else "ignore"
    if given is not None:
        return pictures_of(labels, given, option, endings, exif)
    if origin is None or not Path(origin.data).exists():
        return None
    return pictures_of(labels, Path(origin.data), option, endings, exif)


def _say_unreadable(console: Console, pictures: Mapping[str, Pictures | None]) -> None:
    for option, given in pictures.items():
        if given is not None and given.unreadable:
            key, reason = next(iter(given.unreadable.items()))
            count = len(given.unreadable)
            _say(console, f"{option}: {count} unreadable images were not compared, such as {key} ({reason})")


def _say(console: Console, text: Any) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
