"""The inputs of each cell, compared with explicit lists and with the rules of the window."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from revnets.engine import graph as graph_module
from revnets.engine.graph import DIRECTIONS, STEM, Graph, Node, ReadError, wire
from tests.support.errors import raises_error


def reads(graph: Graph) -> list[tuple[int, ...]]:
    return [node.reads for node in graph.nodes]


def test_revcol():
    graph = wire(12, 4, [["below", "above"]] * 4)
    assert reads(graph) == [
        *[(STEM,), (0,), (1,), (2,)],
        *[(STEM, 1), (4, 2), (5, 3), (6,)],  # the top level has no level above
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


def test_duplicate_inputs_are_merged():
    graph = wire(6, 2, [["stem", "below", 1, "top"], ["below", 1, "full"]])
    assert reads(graph)[2:4] == [(STEM, 1), (2,)]


def test_top_level_with_above_reads_only_the_stem():
    assert reads(wire(4, 2, [["above"]] * 2)) == [(STEM,), (STEM,), (1,), (STEM,)]


def test_last_column_may_be_incomplete():
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
def test_inputs_outside_the_window_raise(token, code):
    with raises_error(ReadError, code=code, key="reads", names=str(token)) as caught:
        wire(6, 3, [[token]] * 3)
    assert "--" not in str(caught.value)  # no index such as x_(t--1)


@pytest.mark.parametrize(("length", "m", "key", "value"), [(4, 1, "m", "1"), (0, 2, "length", "0")])
def test_invalid_sizes_raise(length, m, key, value):
    with raises_error(ReadError, code="out-of-range", key=key, names=f"{key} = {value}"):
        wire(length, m, [["below"]] * m)


TOKENS = ["below", "above", "stem", "top", "full"]


@given(st.data(), st.integers(2, 6), st.integers(1, 40))
def test_inputs_are_available_for_the_inverse(data, m, length):
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


DOWN = wire(16, 4, [["below", "above"]] * 4, directions=["up", "up", "down", "down"])


def test_column_that_runs_down_is_mirrored():
    assert [node.level for node in DOWN.nodes[4:]] == [0, 1, 2, 3, 3, 2, 1, 0, 3, 2, 1, 0]
    assert reads(DOWN)[8:] == [(6,), (8, 5), (9, 4), (10,), (9,), (12, 10), (13, 11), (14,)]
    kinds = [[DOWN.kind(node, read) for read in node.reads] for node in DOWN.nodes[12:]]
    assert kinds == [["above"], ["below", "above"], ["below", "above"], ["below"]]
    assert DOWN.table()[9] == ("c2.l2", "c2.l3, c1.l1", "c1.l2")


def test_residual_offsets_where_the_direction_changes():
    graph = wire(16, 4, [["below", "above"]] * 4, directions=["up", "down", "up", "up"])
    distances = [node.index - node.residual for node in graph.nodes if node.residual is not None]
    assert distances == [1, 3, 5, 7, 1, 3, 5, 7, 4, 4, 4, 4]


def test_states_of_a_column_start_at_level_0():
    assert [list(DOWN.states_of(column)) for column in range(4)] == [
        *[[0, 1, 2, 3], [4, 5, 6, 7]],
        *[[11, 10, 9, 8], [15, 14, 13, 12]],
    ]
    assert DOWN.last == (15, 14, 13, 12)
    short = Graph(4, DOWN.nodes[:10])  # levels 0 and 1 are from the previous column
    assert short.last == (4, 5, 9, 8)
    assert short.is_invertible


def test_named_inputs_of_a_column_that_runs_down():
    tokens: list[str | int] = ["top", "full", "before", "stem", 1, 3]
    found = {token: wire(12, 4, [[token]] * 4, [0] * 4, ["up", "down", "down"]).nodes for token in tokens}
    at_turn, after = ({token: [node.reads for node in nodes[start : start + 4]] for token, nodes in found.items()}
                      for start in (4, 8))  # fmt: skip
    assert at_turn["top"] == [(0,), (0,), (0,), (STEM,)]
    assert after["top"] == [(7,), (7,), (7,), (STEM,)]
    assert at_turn["full"] == [(0, 1, 2), (4, 0, 1), (5, 4, 0), (6, 5, 4)]
    assert after["full"] == [(7, 6, 5), (8, 7, 6), (9, 8, 7), (10, 9, 8)]
    assert at_turn["before"] == [(0, 1, 2, 3)] * 4
    assert at_turn["stem"] == [(STEM,)] * 4
    assert (at_turn[1], after[1]) == ([(0,), (4,), (5,), (6,)], [(7,), (8,), (9,), (10,)])
    assert (at_turn[3], after[3]) == ([(2,), (1,), (0,), (4,)], [(5,), (6,), (7,), (8,)])


def test_constant_is_added_at_the_first_level_of_a_column():
    graph = wire(12, 3, [["below"]] * 3, directions=["up", "up", "down", "down"], constant=2)
    assert [graph.name(node.index) for node in graph.nodes if node.constant] == ["c2.l2"]
    assert graph.table()[6] == ("c2.l2", "stem, constant", "c1.l2")


def test_nodes_from_pickles_without_a_constant():
    node = DOWN.nodes[9]
    old = object.__new__(Node)
    old.__setstate__([9, 2, 2, (8, 5), 6])  # the fields of older pickles
    assert old == node == pickle.loads(pickle.dumps(node))


@pytest.mark.parametrize(
    ("options", "key", "code", "names"),
    [
        ({"directions": ["up", "left", "down"]}, "directions", "unknown-choice", ["left", "up or down"]),
        ({"directions": ["down", "up", "down"]}, "directions", "conflicting-values", "first column"),
        ({"directions": ["up", "down"]}, "directions", "wrong-length", ["2 directions", "3 columns"]),
        ({"constant": 3}, "constant", "out-of-range", ["column 3", "0 to 2"]),
        ({"constant": -1}, "constant", "out-of-range", "-1"),
        ({"constant": True}, "constant", "out-of-range", "True"),
    ],
)
def test_invalid_directions_and_constants_raise(options, key, code, names):
    with raises_error(ReadError, code=code, key=key, names=names):
        wire(8, 3, [["below"]] * 3, **options)


@given(st.data(), st.integers(2, 6), st.integers(1, 40))
def test_a_cell_reads_the_latest_states_of_other_levels_in_any_directions(data, m, length):
    token = st.sampled_from([*TOKENS, *range(1, m)])
    level_reads = data.draw(st.lists(st.lists(token, max_size=4), min_size=m, max_size=m))
    later = -(-length // m) - 1
    directions = ["up", *data.draw(st.lists(st.sampled_from(DIRECTIONS), min_size=later, max_size=later))]
    graph = wire(length, m, level_reads, directions=directions)
    latest: dict[int, int] = {}
    for node in graph.nodes:
        position = node.index % m
        assert node.level == (position if directions[node.column] == "up" else m - 1 - position)
        assert node.residual == latest.pop(node.level, None)
        assert set(node.reads) <= {STEM, *latest.values()}
        latest[node.level] = node.index
    assert sorted(graph.last) == sorted(latest.values())
    assert graph.is_invertible


def test_module_does_not_import_torch():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('graph', {str(Path(graph_module.__file__))!r})\n"
        "module = sys.modules['graph'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert module.wire(4, 2, [['below']] * 2).columns == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
