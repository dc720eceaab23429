"""Output of an audit: text, colors, plain data and readable sizes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from revnets.analysis.audit import audit
from revnets.utils.format import duration, size, thinned
from tests.support.audit_networks import by_mode, conv_columns, render, stem_output


def test_table_marks_errors_in_words_and_colors():
    result = audit(conv_columns(16, gain=0.2), stem_output())
    text = render(result)
    rows = {line.split()[0]: line for line in reversed(text.splitlines()) if line.split()}
    assert "WRONG" in rows["invert"]
    assert "bit for bit" in rows["exact"]
    assert "reference" in rows["store"]
    modes = by_mode(result)
    assert size(modes["exact"].kept_bytes) in rows["exact"]
    assert f"{modes['exact'].forward_matmuls}+{modes['exact'].backward_matmuls}" in rows["exact"]
    assert modes["invert"].worst_parameter in text
    assert "bit for bit" in rows["0"]
    green, red = "\x1b[32m", "\x1b[31m"
    colored = render(result, color=True).splitlines()
    assert any(f"{red}WRONG" in line for line in colored)
    assert sum(f"{green}bit for bit" in line for line in colored) == 2 + len(result.columns)
    assert max(map(len, text.splitlines())) <= 80


def test_long_table_is_shortened():
    assert thinned([1, 2, 3, 4], 4) == [1, 2, 3, 4]
    assert thinned(list(range(10)), 4) == [0, 1, None, 8, 9]


def test_dict_is_plain_json():
    result = audit(conv_columns(2), stem_output())
    infinite = replace(result, modes=tuple(replace(mode, gradient_error=math.inf) for mode in result.modes))
    for each in (result, infinite):
        data = json.loads(json.dumps(each.to_dict(), allow_nan=False))
        assert data == each.to_dict()
        assert data["ok"] is each.ok
        assert [mode["verdict"] for mode in data["modes"]] == [each.verdict(mode) for mode in each.modes]
    assert infinite.to_dict()["modes"][0]["gradient_error"] == "inf"
    assert result.to_dict()["modes"][3]["bytes_per_column"] == by_mode(result)["exact"].bytes_per_column
    assert result.to_dict()["columns"][0]["elements"] == list(result.columns[0].elements)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1.43 * 2**20, "1.43 MiB"),
        (12.34 * 2**30, "12.3 GiB"),
        (512 * 2**40, "512 TiB"),
        (-2048, "-2.00 KiB"),
        (math.nan, "-"),
    ],
)
def test_readable_sizes(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(123.4, "123 s"), (12.34, "12.3 s"), (1.234, "1.23 s"), (0.4321, "432 ms"), (0.00432, "4.32 ms"), (math.nan, "-")],
)
def test_readable_durations(seconds, text):
    assert duration(seconds) == text
