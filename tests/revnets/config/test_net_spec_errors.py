"""Each mistake in a YAML file raises a one-line error."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import revnets
from tests.support.errors import raises_error
from tests.support.spec_mistakes import CONVNEXT, GOOD, MISTAKES, Mistake


@pytest.mark.usefixtures("own_components")
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.key}-{mistake.new.strip()[:40]}")
def test_bad_value(tmp_path: Path, mistake: Mistake) -> None:
    file = tmp_path / "net.yaml"
    file.write_text(mistake.text)
    with raises_error(code=mistake.code, key=mistake.key, source=file) as caught:
        revnets.build(file)
    error = caught.value
    assert mistake.lacks(f"{error.message}. {error.hint}") == []
    assert str(error) == f"{file}: {mistake.key}: {error.message}" + (f". {error.hint}" if error.hint else "")


OWN_BLOCKS = """
from torch import nn

TABLE = {}

class Strange(nn.Module):
    def __init__(self, dim: int):
        super().__init__()

class Clashes(nn.Module):
    def __init__(self, dim: int, stride: int):
        super().__init__()

class Picky(nn.Module):
    def __init__(self, dim: int):
        raise ValueError(f"no {dim} for me.\\nBecause.")

class Broken(nn.Module):
    def __init__(self, dim: int):
        {}["color"]

def nothing(dim):
    return None
"""


@pytest.mark.parametrize(
    ("key", "block", "code", "names"),
    [
        ("levels.0.block", "own_blocks:Clashes", "name-clash", ["stride", "own_blocks:Clashes"]),
        ("levels.0.block", "own_blocks:TABLE", "invalid-component", ["TABLE", "dict"]),
        ("levels.0.block", "own_blocks:", "unknown-component", ["own_blocks", '""']),
        ("levels.0.block", ":Strange", "import-failed", ['":Strange"', "ValueError"]),
        ("levels.0.block", "own_blocks:Strange:X", "unknown-component", ['"Strange:X"']),
        ("levels.0.block", "..own_blocks:Strange", "import-failed", ["TypeError", "relative import"]),
        ("levels.0.block", "raises:Block", "import-failed", ["ZeroDivisionError", "raises.py, line 3"]),
        ("levels.0.block", "exits:Block", "import-failed", ["SystemExit: 3", "exits.py, line 2"]),
        ("levels.0.block", "unparsable:Block", "import-failed", ["SyntaxError", "unparsable.py, line 1"]),
        ("levels.0.block", "lacking:Block", "import-failed", ["nothing_of_that_name"]),
        ("levels.0", "own_blocks:Picky", "component-failed", ['"own_blocks:Picky": no 8 for me']),
        ("levels.0", "own_blocks:Broken", "component-failed", ["KeyError: 'color'"]),
        ("levels.0.block", "own_blocks:nothing", "invalid-component", ["own_blocks:nothing", "torch.nn.Module"]),
    ],
)
def test_invalid_custom_block(own_modules: Path, key: str, block: str, code: str, names: list[str]) -> None:
    (own_modules / "own_blocks.py").write_text(OWN_BLOCKS)
    (own_modules / "raises.py").write_text("def f():\n    1\n    return 1 / 0\n\nf()\n")
    (own_modules / "exits.py").write_text("import sys\nsys.exit(3)\n")
    (own_modules / "unparsable.py").write_text("class Block(:\n")
    (own_modules / "lacking.py").write_text("import nothing_of_that_name\n")
    file = own_modules / "net.yaml"
    file.write_text(GOOD.replace(CONVNEXT, f"block: '{block}'", 1))
    with raises_error(code=code, key=key, source=file, names=names):
        revnets.build(file)


WORDS = ["convnext", "vit", "linear", "identity", "full", "exact", "1e-3", "torch.nn:Identity", "os:", ":"]
SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(-3, 9), st.floats(), st.dates(), st.binary(max_size=3)),
    *(st.text(max_size=5), st.sampled_from(WORDS)),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, keys: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [keys] * bool(keys) + [place for key, item in items for place in places(item, (*keys, key))]


@given(st.lists(st.tuples(st.sampled_from(places(yaml.safe_load(GOOD))), VALUES), min_size=1, max_size=3))
def test_any_values_give_a_network_or_a_one_line_error(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    data = yaml.safe_load(GOOD)
    for keys, value in changes:
        place: Any = data
        with suppress(LookupError, TypeError):  # an earlier change has removed this key
            for key in keys[:-1]:
                place = place[key]
            place[keys[-1]] = value
    before = repr(data)  # nan is not equal to itself
    message = ""
    try:
        with torch.device("meta"):
            revnets.build(data)
    except revnets.SpecError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 500
    assert repr(data) == before
