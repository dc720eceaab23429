"""A contact sheet: suspects beside what they resemble, for a person to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from revnets.utils.atomic_files import replacing
from vision.near_duplicates.pictures import Pictures
from vision.near_duplicates.suspects import Suspect

PAIRS, ACROSS = 60, 6
"""What a person can look at in a minute, and how many of them are in a row."""

CELL, GAP, LINE = 96, 12, 13
"""Pixels a side of a picture, between pairs, and of a line of text."""

PAPER, INK, PALE = "white", "#222222", "#777777"


def shown(suspects: Sequence[Suspect]) -> list[Suspect]:
    """Those on a sheet: of the least certain by their pixels, which need eyes most, and of others in even steps."""
    if len(suspects) <= PAIRS:
        return list(suspects)
    half = PAIRS // 2
    certain = suspects[: len(suspects) - half]
    return [certain[number * len(certain) // half] for number in range(half)] + list(suspects[-half:])


def contact_sheet(suspects: Sequence[Suspect], copies: Pictures, originals: Pictures) -> Image.Image:
    """Each pair side by side, the suspect on the left, its scores below.

    Args:
        suspects: the most certain first; `shown` says which are drawn.
        copies: pictures of the suspects.
        originals: pictures of those that they resemble.
    """
    chosen = shown(suspects)
    rows = -(-len(chosen) // ACROSS)
    wide, high = 2 * CELL + GAP, CELL + 3 * LINE + GAP
    sheet = Image.new("RGB", (ACROSS * wide + GAP, rows * high + 2 * LINE + GAP), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    title = f"{len(chosen)} of {len(suspects)} pairs: suspect left, original right; r: correlation of pixels"
    draw.text((GAP, GAP // 2), title, INK, font)
    for number, suspect in enumerate(chosen):
        left, top = GAP + number % ACROSS * wide, 2 * LINE + number // ACROSS * high
        for place, picture in enumerate((copies.read(suspect.key), originals.read(suspect.against))):
            if picture is not None:
                sheet.paste(_fitted(picture), (left + place * CELL, top))
        scores = [f"d {suspect.distance:.2f}"]
        scores += [] if suspect.bits is None else [f"{suspect.bits} bits"]
        scores += [] if suspect.correlation is None else [f"r {suspect.correlation:.3f}"]
        scores += [] if suspect.cosine is None else [f"cos {suspect.cosine:.2f}"]
        texts = ((", ".join(scores), INK), (suspect.key, PALE), (suspect.against, PALE))
        for line, (text, color) in enumerate(texts):
            draw.text((left, top + CELL + line * LINE), _shortened(text, font), color, font)
    return sheet


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as PNG; it appears complete or not at all.

    Raises:
        OSError: no space, no permission and the like; its `filename` is the path.
    """
    with replacing(path) as file:
        sheet.save(file, "PNG")


def _fitted(picture: Image.Image) -> Image.Image:
    """A picture in the middle of a square cell."""
    cell = Image.new("RGB", (CELL - 2, CELL - 2), "#dddddd")
    scale = (CELL - 2) / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    fitted = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    cell.paste(fitted, ((cell.width - size[0]) // 2, (cell.height - size[1]) // 2))
    return cell


def _shortened(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The end of a text, as much as fits below a pair."""
    text = text.encode("latin-1", "replace").decode("latin-1")  # what every font has
    shorter = text
    while len(shorter) > 4 and font.getlength(shorter) > 2 * CELL:
        shorter = "..." + shorter[4 + (len(shorter) > 60) * 20 :]
    return shorter
