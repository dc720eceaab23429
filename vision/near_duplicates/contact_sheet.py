"""A contact sheet that shows suspects next to the images that they resemble, for visual inspection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from revnets.utils.atomic_files import replacing
from vision.near_duplicates.pictures import Pictures
from vision.near_duplicates.suspects import Suspect

PAIRS, ACROSS = 60, 6
"""Most pairs on a sheet, and pairs in a row."""

CELL, GAP, LINE = 96, 12, 13
"""Sizes in pixels: the side of an image, the gap between pairs, and the height of a line of text."""

PAPER, INK, PALE = "white", "#222222", "#777777"


def shown(suspects: Sequence[Suspect]) -> list[Suspect]:
    """The suspects on a sheet: the least certain ones by their pixels, and an even selection of the others."""
    if len(suspects) <= PAIRS:
        return list(suspects)
    half = PAIRS // 2
    certain = suspects[: len(suspects) - half]
    return [certain[number * len(certain) // half] for number in range(half)] + list(suspects[-half:])


def contact_sheet(suspects: Sequence[Suspect], copies: Pictures, originals: Pictures) -> Image.Image:
    """Draw each pair side by side, with the suspect on the left and the scores below.

    Args:
        suspects: The most certain first; `shown` selects those that are drawn.
        copies: Images of the suspects.
        originals: Images that they resemble.
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
    """Write a sheet as PNG atomically.

    Raises:
        OSError: If the file cannot be written, for lack of space or permission. Its `filename` is the path.
    """
    with replacing(path) as file:
        sheet.save(file, "PNG")


def _fitted(picture: Image.Image) -> Image.Image:
    """An image centered in a square cell."""
    cell = Image.new("RGB", (CELL - 2, CELL - 2), "#dddddd")
    scale = (CELL - 2) / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    fitted = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    cell.paste(fitted, ((cell.width - size[0]) // 2, (cell.height - size[1]) // 2))
    return cell


def _shortened(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The end of a text that fits below a pair."""
    text = text.encode("latin-1", "replace").decode("latin-1")  # characters of every font
    shorter = text
    while len(shorter) > 4 and font.getlength(shorter) > 2 * CELL:
        shorter = "..." + shorter[4 + (len(shorter) > 60) * 20 :]
    return shorter
