"""Wires: what each cell reads, against lists written by hand and against the rules of the window."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from revnets.engine import graph as graph_module
from revnets.engine.graph import STEM, Graph, ReadError, wire
from tests.support.errors import raises_error


def reads(graph: Graph) -> list[tuple[int, ...]]:
    return [node.reads for node in graph.nodes]


def test_revcol():
    graph = wire(12, 4, [["below", "above"]] * 4)
    assert reads(graph) == [
        *[(STEM,), (0,), (1,), (2,)],
        *[(STEM, 1), (4, 2), (5, 3), (6,)],  # the top level has nothing above it
        *[(STEM, 5), (8, 6), (9, 7), (10,)],
    ]
    assert [node.residual for node in graph.nodes] == [None] * 4 + list(range(8))


def test_revcol_h_reads_the_top_at_level_0():
    graph = wire(8, 4, [["below", "above", "top"], *[["below", "above"]] * 3])
    assert reads(graph)[4:] == [(STEM, 1, 3), (4, 2), (5, 3), (6,)]


def test_full_is_the_whole_window():
    graph = wire(9, 3, [["full"]] * 3)
    assert reads(graph)[:3] == [(STEM,), (0,), (1, 0)]
    assert reads(graph)[3:6] == [(STEM, 2, 1), (3, 2), (4, 3)]


def test_m_2_is_a_revnet():
    assert reads(wire(6, 2, [[1]] * 2)) == [(STEM,), (0,), (1,), (2,), (3,), (4,)]


def test_a_wire_is_drawn_once_however_many_names_it_has():
    graph = wire(6, 2, [["stem", "below", 1, "top"], ["below", 1, "full"]])
    assert reads(graph)[2:4] == [(STEM, 1), (2,)]


def test_top_level_above_reads_the_stem_alone():
    assert reads(wire(4, 2, [["above"]] * 2)) == [(STEM,), (STEM,), (1,), (STEM,)]


def test_the_last_column_may_be_short():
    graph = wire(7, 3, [["below", "above"]] * 3)
    assert graph.columns == 3
    assert [(node.column, node.level) for node in graph.nodes[-2:]] == [(1, 2), (2, 0)]


def test_names_kinds_and_table():
    graph = wire(4, 2, [["stem", "above"], ["below"]])
    assert graph.name(STEM) == "stem"
    assert graph.name(3) == "c1.l1"
    node = graph.nodes[2]
    assert [graph.kind(node, read) for read in node.reads] == ["stem", "above"]
    assert graph.kind(graph.nodes[3], 2) == "below"
    assert graph.table() == [
        ("c0.l0", "stem", "-"),
        ("c0.l1", "c0.l0", "-"),
        ("c1.l0", "stem, c0.l1", "c0.l0"),
        ("c1.l1", "c1.l0", "c0.l1"),
    ]


@pytest.mark.parametrize(
    ("token", "code"),
    [
        *((offset, "out-of-range") for offset in (0, 3, 4, -1)),
        *((token, "wrong-type") for token in (True, None, 1.0)),
        ("side", "unknown-choice"),
    ],
)
def test_reads_outside_the_window(token, code):
    with raises_error(ReadError, code=code, key="reads", names=str(token)) as caught:
        wire(6, 3, [[token]] * 3)
    assert "--" not in str(caught.value)  # x_(t--1) is no name of anything


@pytest.mark.parametrize(("length", "m", "key", "value"), [(4, 1, "m", "1"), (0, 2, "length", "0")])
def test_sizes_that_make_no_column(length, m, key, value):
    with raises_error(ReadError, code="out-of-range", key=key, names=f"{key} = {value}"):
        wire(length, m, [["below"]] * m)


TOKENS = ["below", "above", "stem", "top", "full"]


@given(st.data(), st.integers(2, 6), st.integers(1, 40))
def test_every_read_is_still_there_when_it_is_inverted(data, m, length):
    token = st.sampled_from([*TOKENS, *range(1, m)])
    level_reads = data.draw(st.lists(st.lists(token, max_size=4), min_size=m, max_size=m))
    graph = wire(length, m, level_reads)
    assert [node.index for node in graph.nodes] == list(range(length))
    for node in graph.nodes:
        assert (node.column, node.level) == divmod(node.index, m)
        assert node.residual == (node.index - m if node.index >= m else None)
        assert node.reads
        assert len(set(node.reads)) == len(node.reads)
        assert all(read == STEM or max(0, node.index - m + 1) <= read < node.index for read in node.reads)


def test_torch_is_not_needed():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('graph', {str(Path(graph_module.__file__))!r})\n"
        "module = sys.modules['graph'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert module.wire(4, 2, [['below']] * 2).columns == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
