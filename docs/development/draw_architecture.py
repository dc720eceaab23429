"""Draw docs/assets/architecture.png: the directories of the three packages and their imports.

    python docs/development/draw_architecture.py

Rows are the layers of the contracts in pyproject.toml. Arrows are imports found in the syntax trees of the files. If a
imports b and b imports c, the arrow from a to c is omitted. An import against the direction of a contract is drawn
upward in red.
"""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "docs" / "assets" / "architecture.png"
COLORS = {"vision": "#E3F0FA", "revnets": "#E4F4EC", "nlp": "#FBEFE0"}
EDGES = {"vision": "#3B7FB5", "revnets": "#2E8B62", "nlp": "#C07A22"}
WIDTH, GAP, LANE, LINE = 3.3, 0.34, 0.15, 0.155  # inches: a box, between boxes, between lanes, a line of small type
CHARACTERS = 46  # of a line of small type in a box of full width

Edge = tuple[str, str]


@dataclass(frozen=True)
class Box:
    """A directory, or a file next to the directories. Positions are in inches; `top` is measured downward."""

    name: str
    lines: list[str]
    left: float
    top: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        return self.left + self.width / 2


def layers(package: str) -> list[list[str]]:
    """Return the existing directories and files of a package in the rows of its contract."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = [item for item in contracts if item.get("containers") == [package]]
    rows = [re.findall(r"\w+", layer) for layer in contract["layers"]]
    exists = [[name for name in row if files(package, name)] for row in rows]
    return [row for row in exists if row]


def files(package: str, name: str) -> list[Path]:
    """Return the files of a directory, or the file of that name."""
    folder = ROOT / package / name
    if folder.is_dir():
        return sorted(folder.glob("*.py"))
    file = folder.with_suffix(".py")
    return [file] if file.exists() else []


def imported(file: Path) -> Iterator[tuple[str, ...]]:
    """Yield the names that a file imports at run time, as tuples; relative imports are resolved."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    for node in _executed(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = parts[: -node.level] if node.level else ()
            module = (*start, *(node.module or "").split(".")) if node.module else start
            yield from ((*module, alias.name) for alias in node.names)


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes except those for type checkers only."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _executed(child)


def imports(package: str) -> set[Edge]:
    """Return the imports between directories of a package."""
    names = [name for row in layers(package) for name in row]
    found = {
        (name, target[1])
        for name in names
        for file in files(package, name)
        for target in imported(file)
        if target[0] == package and len(target) > 1
    }
    return {(source, target) for source, target in found if source != target and target in names}


def used_of_revnets(package: str) -> list[str]:
    """Return the directories of revnets that a package imports."""
    targets = {target for file in (ROOT / package).rglob("*.py") for target in imported(file) if target[0] == "revnets"}
    return [name for row in layers("revnets") for name in row if any(name in target[1:2] for target in targets)]


def reduced(edges: set[Edge]) -> set[Edge]:
    """Remove the edges that a longer path implies."""

    def reaches(start: str, end: str, seen: frozenset[str]) -> bool:
        return any(
            target == end or reaches(target, end, seen | {target})
            for source, target in edges
            if source == start and target not in seen
        )

    def follows(edge: Edge) -> bool:
        steps = [target for source, target in edges if source == edge[0] and target != edge[1]]
        return any(reaches(step, edge[1], frozenset({edge[0], step})) for step in steps)

    return {edge for edge in edges if not follows(edge)}


def boxes(package: str, left: float, top: float) -> list[list[Box]]:
    """Return the boxes of a package, row by row."""
    rows = []
    for row in layers(package):
        width = (WIDTH - GAP * (len(row) - 1)) / len(row)
        contents = []
        for name in row:
            modules = [file.stem for file in files(package, name) if file.stem not in ("__init__", name)]
            most = int(CHARACTERS * (width - 0.1) / WIDTH)
            wrapped = textwrap.wrap(", ".join(modules), most, break_long_words=False)
            contents.append((name if (ROOT / package / name).is_dir() else f"{name}.py", wrapped))
        height = 0.36 + LINE * max(len(lines) for _, lines in contents)
        places = [left + index * (width + GAP) for index in range(len(row))]
        rows.append(
            [Box(title, lines, x, top, width, height) for (title, lines), x in zip(contents, places, strict=True)]
        )
        top += height + GAP
    return rows


def draw_arrow(figure: Figure, points: list[tuple[float, float]], color: str) -> None:
    """Draw a line with an arrowhead through points, in inches from the top left."""
    width, height = figure.get_size_inches()
    scaled = [(x / width, 1 - y / height) for x, y in points]
    for start, end in pairwise(scaled[:-1]):
        figure.add_artist(FancyArrowPatch(start, end, arrowstyle="-", color=color, lw=1.1, shrinkA=0, shrinkB=0))
    head = FancyArrowPatch(
        scaled[-2], scaled[-1], arrowstyle="-|>", mutation_scale=9, color=color, lw=1.1, shrinkA=0, shrinkB=0
    )
    figure.add_artist(head)


def draw_box(figure: Figure, box: Box, fill: str, edge: str) -> None:
    width, height = figure.get_size_inches()
    place = (box.left / width, 1 - (box.top + box.height) / height)
    figure.add_artist(
        FancyBboxPatch(
            place, box.width / width, box.height / height, boxstyle="square,pad=0", facecolor=fill, edgecolor=edge, lw=1
        )
    )
    x = box.middle / width
    figure.text(x, 1 - (box.top + 0.19) / height, box.name, ha="center", va="center", weight="bold", size=10.5)
    for index, line in enumerate(box.lines):
        y = 1 - (box.top + 0.40 + index * LINE) / height
        figure.text(x, y, line, ha="center", va="center", size=7.6, color="#333333")


def draw_package(figure: Figure, package: str, rows: list[list[Box]]) -> None:
    """Draw boxes, arrows between neighboring rows, and lanes at both sides for longer arrows."""
    place = {box.name.removesuffix(".py"): (index, box) for index, row in enumerate(rows) for box in row}
    lanes: dict[str, list[tuple[int, int, int]]] = {"left": [], "right": []}
    edges = reduced(imports(package))
    # Short arrows come first and take the lanes next to the boxes.
    for source, target in sorted(edges, key=lambda edge: (place[edge[1]][0] - place[edge[0]][0], edge)):
        (start, upper), (end, lower) = place[source], place[target]
        color = EDGES[package] if start < end else "#CC2222"
        if end == start + 1:
            x = min((upper, lower), key=lambda box: box.width).middle
            draw_arrow(figure, [(x, upper.top + upper.height), (x, lower.top)], color)
            continue
        narrow = min((upper, lower), key=lambda box: box.width)
        is_right = narrow.width == WIDTH or narrow.middle > rows[0][0].middle
        side = "right" if is_right else "left"
        taken = {lane for lane, first, last in lanes[side] if first <= end and start <= last}
        lane = next(lane for lane in range(len(taken) + 1) if lane not in taken)
        lanes[side].append((lane, start, end))
        sign = 1 if is_right else -1
        outside = rows[0][0].middle + sign * (WIDTH / 2 + LANE * (lane + 1.2))
        ends = [box.left + (box.width if is_right else 0) for box in (upper, lower)]
        shift = 0.05 * (lane + 1)
        y, z = upper.top + upper.height / 2 + shift, lower.top + lower.height / 2 - shift
        draw_arrow(figure, [(ends[0], y), (outside, y), (outside, z), (ends[1], z)], color)
    for row in rows:
        for box in row:
            draw_box(figure, box, COLORS[package], EDGES[package])


def main() -> None:
    """Draw the three packages side by side, revnets in the middle."""
    margin, head, between = 1.0, 0.95, 1.6
    order = ("vision", "revnets", "nlp")
    columns = {name: boxes(name, margin + index * (WIDTH + between), head) for index, name in enumerate(order)}
    bottom = max(rows[-1][0].top + rows[-1][0].height for rows in columns.values())
    size = (2 * margin + 3 * WIDTH + 2 * between, bottom + 0.35)
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    for package, rows in columns.items():
        middle = rows[0][0].left + (sum(box.width for box in rows[0]) + GAP * (len(rows[0]) - 1)) / 2
        figure.text(middle / size[0], 1 - 0.32 / size[1], package, ha="center", va="center", weight="bold", size=16)
        uses = (
            f"imports {', '.join(used_of_revnets(package))} of revnets"
            if package != "revnets"
            else "imports neither of them"
        )
        for index, line in enumerate(textwrap.wrap(uses, 48)):
            y = 1 - (0.58 + 0.16 * index) / size[1]
            figure.text(middle / size[0], y, line, ha="center", va="center", size=8.5, color="#333333")
        draw_package(figure, package, rows)
    left, center, right = (columns[name][0][0] for name in order)
    draw_arrow(figure, [(left.left + WIDTH, 0.32), (center.left, 0.32)], "#444444")
    draw_arrow(figure, [(right.left, 0.32), (center.left + WIDTH, 0.32)], "#444444")
    lowest = columns["nlp"][-1][0]
    legend = (
        "An arrow is an import.",
        "Imports that others imply are omitted.",
        "Rows are layers, checked by make lint.",
        "Red: the one exception.",
    )
    for index, line in enumerate(legend):
        y = 1 - (lowest.top + lowest.height + 0.6 + 0.22 * index) / size[1]
        figure.text(right.left / size[0], y, line, size=9.5, color="#333333")
    figure.savefig(OUTPUT, dpi=110)


if __name__ == "__main__":
    main()
