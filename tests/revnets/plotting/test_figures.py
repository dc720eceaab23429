from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.text import Text

from revnets.analysis.audit_report import Audit, ColumnAudit, ModeAudit
from revnets.engine.errors import ArgumentError
from revnets.engine.graph import STEM, Graph, wire
from revnets.plotting.audit import audit_figure
from revnets.plotting.graph import HEAD, MOST_COLUMNS, MOST_LABELED, TAIL, WIRES, graph_figure
from revnets.plotting.style import FORMATS, MODE_COLORS, save
from revnets.utils.format import size
from tests.support.errors import raises_error

READS = {
    "revcol": ("below", "above"),
    "full": ("full",),
    "top": ("below", "above", "top"),
    "stem": ("below", "stem"),
    "offset": (1,),
}


def graph(columns: int, m: int, reads: str = "revcol") -> Graph:
    return wire(columns * m, m, [READS[reads]] * m)


def labels(m: int) -> list[str]:
    return [f"{64 << level} x {56 >> level} x {56 >> level}\n{2 + level} x convnext" for level in range(m)]


def texts(artist) -> list[Text]:
    return [text for text in artist.findobj(Text) if text.get_text() and text.get_visible()]


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in texts(figure))


def assert_apart(figure: Figure, artist) -> None:
    """Assert that no text of an artist overlaps another one or leaves the figure."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    places = [(text.get_text(), text.get_window_extent(renderer)) for text in texts(artist)]
    places = [(text, box) for text, box in places if box.overlaps(figure.bbox)]  # without tick labels outside the axis
    for (a, box_a), (b, box_b) in itertools.combinations(places, 2):
        assert not box_a.overlaps(box_b), (a, b)
    for text, box in places:
        assert figure.bbox.padded(1).containsx(box.x0), text
        assert figure.bbox.padded(1).containsx(box.x1), text
        assert figure.bbox.padded(1).containsy(box.y0), text
        assert figure.bbox.padded(1).containsy(box.y1), text


# -------------------------------------------------------------------------------------------------------------- graph


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize(("columns", "m"), [(1, 2), (2, 4), (4, 4), (16, 4), (13, 6)])
def test_texts_do_not_overlap_or_leave_the_figure(columns, m, reads):
    figure = graph_figure(graph(columns, m, reads), labels(m))
    assert_apart(figure, figure)


def _boxes(figure: Figure) -> list:
    """Return boxes of states (left, bottom, right, top) from left to right and bottom to top, without the stem."""
    boxes = [patch.get_bbox().extents for patch in figure.findobj(FancyBboxPatch)]
    stem = min(boxes, key=lambda box: box[1])
    return sorted((tuple(box) for box in boxes if tuple(box) != tuple(stem)), key=lambda box: (box[0], box[1]))


def _wires(figure: Figure) -> dict[str, list]:
    """Return the control points of the connections by kind, without the samples in the legend below the boxes."""
    lowest = min(box[1] for box in _boxes(figure))
    kinds = {color: kind for kind, (color, _) in WIRES.items()}
    wires: dict[str, list] = {kind: [] for kind in WIRES}
    for arrow in figure.findobj(FancyArrowPatch):
        points = arrow._path_original.vertices
        if points[-1][1] >= lowest - 1e-6:
            wires[kinds[to_hex(arrow.get_edgecolor()).upper()]].append(points)
    return wires


def _touched(boxes: list, point) -> int:
    """Return the index of the box with a point on its edge."""
    found = [
        index
        for index, (left, bottom, right, top) in enumerate(boxes)
        if left - 1e-6 <= point[0] <= right + 1e-6
        and bottom - 1e-6 <= point[1] <= top + 1e-6
        and min(abs(point[0] - left), abs(point[0] - right), abs(point[1] - bottom), abs(point[1] - top)) < 1e-6
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize(("columns", "m"), [(1, 3), (4, 2), (5, 4), (12, 3), (3, 6)])
def test_connections_agree_with_the_graph(columns, m, reads):
    drawn = graph(columns, m, reads)
    figure = graph_figure(drawn)
    boxes, wires = _boxes(figure), _wires(figure)
    assert len(boxes) == len(drawn.nodes)
    expected = {kind: set() for kind in WIRES}
    for node in drawn.nodes:
        for read in node.reads:
            expected[drawn.kind(node, read)].add((read, node.index))
        if node.residual is not None:
            expected["gain"].add((node.residual, node.index))
    for kind in ("below", "above", "gain"):
        found = [(_touched(boxes, points[0]), _touched(boxes, points[-1])) for points in wires[kind]]
        assert len(found) == len(set(found))
        assert set(found) == expected[kind]
    assert {(STEM, _touched(boxes, points[-1])) for points in wires["stem"]} == expected["stem"]


@pytest.mark.parametrize("reads", READS)
def test_connections_do_not_cross_boxes(reads):
    figure = graph_figure(graph(4, 5, reads), labels(5))
    share = np.linspace(0, 1, 200)[:, None]
    for points in itertools.chain.from_iterable(_wires(figure).values()):
        if len(points) == 2:
            path = points[0] + share * (points[1] - points[0])
        else:  # cubic
            weights = [(1 - share) ** 3, 3 * share * (1 - share) ** 2, 3 * share**2 * (1 - share), share**3]
            path = sum(weight * point for weight, point in zip(weights, points, strict=True))
        for left, bottom, right, top in _boxes(figure):
            inside = (path[:, 0] > left + 1e-3) & (path[:, 0] < right - 1e-3)
            inside &= (path[:, 1] > bottom + 1e-3) & (path[:, 1] < top - 1e-3)
            assert not inside.any()
        assert path[:, 0].max() < figure.get_figwidth()


@pytest.mark.parametrize("reads", READS)
def test_connections_of_columns_that_run_down(reads):
    """Connections in the column run down, those of the previous column arrive from below, residuals are horizontal."""
    directions = ["up", "down", "down", "up", "down"]
    drawn = wire(20, 4, [READS[reads]] * 4, directions=directions)
    figure = graph_figure(drawn)
    boxes, wires = _boxes(figure), _wires(figure)
    place = {node.index: node.column * 4 + node.level for node in drawn.nodes} | {STEM: STEM}
    found = {kind: {(_touched(boxes, points[0]), _touched(boxes, points[-1])) for points in wires[kind]}
             for kind in ("below", "down", "above", "before", "gain")}  # fmt: skip
    expected: dict[str, set] = {kind: set() for kind in found}
    for node in drawn.nodes:
        for read in (drawn.nodes[read] for read in node.reads if read != STEM):
            higher = read.level > node.level
            kind = ("below", "down") if read.column == node.column else ("before", "above")
            expected[kind[higher]].add((place[read.index], place[node.index]))
        if node.residual is not None:
            expected["gain"].add((place[node.residual], place[node.index]))
    assert found == expected
    assert all(points[0][1] == points[-1][1] for points in wires["gain"])
    arrivals = {_touched(boxes, points[-1]) for points in wires["stem"]}
    assert arrivals == {place[node.index] for node in drawn.nodes if STEM in node.reads}
    assert_apart(figure, figure)


@pytest.mark.parametrize(("constant", "y"), [(1, "above"), (3, "below")])
def test_constant_is_drawn_at_its_cell(constant, y):
    figure = graph_figure(wire(12, 3, [READS["revcol"]] * 3, None, ["up", "down", "down", "up"], constant), labels(3))
    ((x, start), (_, end)) = next(points for points in _wires(figure)["constant"])
    assert (start > end) == (y == "above")
    header = next(text for text in texts(figure) if text.get_text() == f"column {constant}")
    assert abs(x - header.get_position()[0]) < 0.3
    assert words(figure).count("constant") == 2  # the box and the legend
    assert_apart(figure, figure)


def test_columns_at_a_change_of_direction_are_drawn():
    def shown(directions: list[str]) -> list[int]:
        figure = graph_figure(wire(2 * len(directions), 2, [READS["revcol"]] * 2, directions=directions))
        assert figure.get_figwidth() < 25
        assert words(figure).count("•") == words(figure).count("• • •") * 3
        names = [text.removeprefix("column ") for text in words(figure).splitlines() if text.startswith("column ")]
        return [int(name) for name in names]

    assert shown(["up"] * 10 + ["down"] * 20) == [0, 1, 2, 8, 9, 10, 11, 12, 28, 29]
    assert shown(["up"] * 4 + ["down"] * 10) == [0, 1, 2, 3, 4, 5, 6, 12, 13]
    assert shown(["up", "down"] * 50) == [*range(HEAD), *range(100 - TAIL, 100)]


def test_labels_are_in_boxes_of_few_columns_and_left_of_many():
    assert words(graph_figure(graph(MOST_LABELED, 3), labels(3))).count("2 x convnext") == MOST_LABELED
    assert words(graph_figure(graph(MOST_LABELED + 1, 3), labels(3))).count("2 x convnext") == 1
    assert "$x_{14}$" in words(graph_figure(graph(5, 3)))
    assert "level 2" in words(graph_figure(graph(5, 3)))


def test_many_columns_are_elided():
    whole = words(graph_figure(graph(MOST_COLUMNS, 2)))
    assert all(f"column {column}" in whole for column in range(MOST_COLUMNS))
    assert "•" not in whole
    figure = graph_figure(graph(100, 2))
    shown = [text.removeprefix("column ") for text in words(figure).splitlines() if text.startswith("column ")]
    assert shown == [str(column) for column in [*range(HEAD), *range(100 - TAIL, 100)]]
    assert "•" in words(figure)
    assert figure.get_figwidth() < 20


def test_legend_contains_the_kinds_in_the_graph():
    assert all(WIRES[kind][1] in words(graph_figure(graph(2, 3))) for kind in ("below", "above", "gain", "stem"))
    branches = words(graph_figure(wire(6, 3, [["below", "before"]] * 3, [0] * 3)))
    assert WIRES["before"][1] in branches
    assert WIRES["gain"][1] not in branches
    alone = words(graph_figure(graph(1, 3)))
    assert WIRES["below"][1] in alone
    assert WIRES["above"][1] not in alone
    assert WIRES["gain"][1] not in alone


def test_residuals_within_a_column_go_around_boxes():
    drawn = wire(7, 7, [[1]] * 7, [2, 2, 2, 2, 0, 2, 2])
    figure = graph_figure(drawn)
    boxes, wires = _boxes(figure), _wires(figure)
    found = {(_touched(boxes, points[0]), _touched(boxes, points[-1])) for points in wires["skip"]}
    assert found == {(node.residual, node.index) for node in drawn.nodes if node.residual is not None}
    assert WIRES["skip"][1] in words(figure)
    assert not wires["gain"]


def test_long_legend_has_several_rows():
    figure = graph_figure(graph(2, 2))
    assert figure.get_figwidth() < 4
    lines = {
        round(text.get_position()[1], 2) for text in texts(figure) if text.get_text() in dict(WIRES.values()).values()
    }
    assert len(lines) > 1


def test_labels_with_dollars_are_plain_text():
    assert "$5 & $6_" in words(graph_figure(graph(1, 2), ["$5 & $6_", "b"]))


def test_number_of_labels_is_checked():
    with raises_error(ArgumentError, code="wrong-length", key="labels", names=["2 labels", "3 levels"]):
        graph_figure(graph(2, 3), labels(2))


def test_a_last_column_may_be_shorter():
    figure = graph_figure(wire(7, 3, [READS["revcol"]] * 3))
    assert len(_boxes(figure)) == 7


# -------------------------------------------------------------------------------------------------------------- audit


def example_audit(columns: int = 6, error: float = 1e-3, exact: bool = True) -> Audit:
    states = tuple(
        ColumnAudit(column, (64, 32), error / 4**column, error, (error / 4**column, error / 5**column), exact)
        for column in range(columns - 1)
    )

    def mode(name: str, error: float, kept: int, slope: int) -> ModeAudit:
        added = (kept, *[slope] * (columns - 1))
        equal = error == 0
        worst = ("", 0.0) if equal else ("cells.0.0.weight", 2 * error)
        return ModeAudit(name, error, *worst, equal, sum(added), 2 * sum(added), added, 10, 30, 1000, 3000)

    modes = (
        mode("store", 0.0, 50_000_000, 50_000_000),
        mode("recompute", 0.0, 4_000_000, 4_000_000),
        mode("invert", error, 4_000_000, 0),
        mode("exact", 0.0, 4_000_000, 600_000),
    )
    return Audit("Net", 2, states, modes, 0.0)


@pytest.mark.parametrize(
    "audit",
    [
        example_audit(),
        example_audit(columns=1),
        example_audit(columns=2),
        example_audit(columns=32, error=3.0),
        example_audit(error=0.0),
        example_audit(error=math.inf, exact=False),
        replace(example_audit(), modes=()),
    ],
    ids=["usual", "one column", "two columns", "deep", "no error", "infinite", "no modes"],
)
def test_texts_of_a_panel_do_not_overlap(audit):
    figure = audit_figure(audit)
    figure.draw_without_rendering()  # computes the layout
    for axes in figure.axes:
        assert_apart(figure, axes)


def test_figure_shows_the_numbers_of_the_audit():
    audit = example_audit()
    figure = audit_figure(audit)
    states, gradients, growth, memory = figure.axes
    line = next(line for line in states.lines if line.get_label().startswith("invert"))
    assert line.get_ydata() == pytest.approx([column.invert_error for column in audit.columns])
    assert [bar.get_width() for bar in gradients.patches] == pytest.approx([0, 1e-3, 0])
    for line, mode in zip(growth.lines, audit.modes, strict=True):
        assert line.get_ydata() == pytest.approx(np.cumsum(mode.column_bytes) / 2**20)
        assert to_hex(line.get_color()).upper() == MODE_COLORS[mode.mode].upper()
    widths = [bar.get_width() * 2**20 for bar in memory.patches]
    assert widths == pytest.approx([*(m.peak_bytes for m in audit.modes), *(m.kept_bytes for m in audit.modes)])
    text = words(figure)
    assert all(f"saved {size(mode.kept_bytes)}, peak {size(mode.peak_bytes)}" in text for mode in audit.modes)
    assert text.count("equal bit for bit") == 3  # two modes, and the states
    assert "error 1.0e-03" in text
    assert "WRONG" not in text


def test_figure_names_errors():
    text = words(audit_figure(example_audit(error=0.5, exact=False)))
    assert "error 5.0e-01: WRONG" in text
    assert "DIFFERS" in text
    assert "not finite: WRONG" in words(audit_figure(example_audit(error=math.nan)))
    audit = example_audit()
    failed = replace(audit.modes[3], gradient_error=math.nan, equal=False, failure="a reason")
    text = words(audit_figure(replace(audit, columns=(), modes=(*audit.modes[:3], failed))))
    assert "failed" in text
    assert "could not be rebuilt" in text
    assert "only store was measured" in words(audit_figure(replace(audit, modes=audit.modes[:1])))


# --------------------------------------------------------------------------------------------------------------- save

MAGIC = {"png": b"\x89PNG\r\n", "svg": b"<?xml", "pdf": b"%PDF-"}


@pytest.mark.parametrize("kind", FORMATS)
def test_figures_are_saved_by_suffix_and_reproducible(kind, tmp_path):
    paths = [tmp_path / "a folder" / f"1.{kind}", tmp_path / f"2.{kind.upper()}"]
    for path in paths:
        save(graph_figure(graph(2, 2), labels(2)), path)
    first, second = (path.read_bytes() for path in paths)
    assert first.startswith(MAGIC[kind])
    assert first == second
    assert sorted(tmp_path.rglob("*.*")) == sorted(paths)  # no other files remain


def test_other_suffixes_are_rejected(tmp_path):
    for name in ("picture.jpg", "picture", ".png"):
        with raises_error(ArgumentError, code="unknown-suffix", key="path", names=[name, ".png, .svg, .pdf"]):
            save(graph_figure(graph(1, 2)), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_old_figure_is_unchanged_if_saving_fails(tmp_path):
    class Broken(Figure):
        def savefig(self, file, **options):
            file.write(b"half")
            raise OSError("disk full")

    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        save(Broken(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_matplotlib_is_imported_with_the_first_figure():
    code = "import sys, revnets, revnets.plotting.audit; print('matplotlib' in sys.modules, 'pyplot' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
