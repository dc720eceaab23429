"""One clear line for each mistake that a YAML can hold."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import revnets

GOOD = """\
columns: 2
stem: {type: patchify, patch: 2}
levels:
  - {dim: 8, depth: 1, block: convnext, kernel_size: 3}
  - {dim: 12, depth: 1, block: vit, heads: 3}
fusion: convnext
reads: [below, above]
gain: {init: 0.5}
memory: exact
taps: [0]
head: {type: classifier, num_classes: 3}
drop_path: 0.1
"""


class Bad(NamedTuple):
    """One mistake: what is replaced in GOOD by what, and what the message must name."""

    old: str
    new: str
    key: str
    value: str  # part of the problem
    remedy: str  # part of the remedy; empty if the sentence ends with the problem


LEVELS = GOOD[GOOD.index("levels:") : GOOD.index("fusion:")]
CONVNEXT = "block: convnext, kernel_size: 3"
IDENTITY = "  - {dim: 8, depth: 1, block: 'torch.nn:Identity'}\n"

BAD = [
    # keys that are not known
    Bad("columns: 2", "colums: 2", "colums", "unknown key (value 2)", "Did you mean columns?"),
    Bad("memory: exact", "zoo: red", "zoo", 'unknown key (value "red")', "Known keys are columns, stem, levels"),
    Bad("kernel_size", "kernal_size", "levels.0.kernal_size", "(value 3)", "Did you mean kernel_size?"),
    Bad("depth: 1", "dept: 1", "levels.0.dept", "(value 1)", "Did you mean depth?"),
    Bad("block: convnext", "blok: convnext", "levels.0.blok", '(value "convnext")', "Did you mean block?"),
    Bad("patch: 2", "pach: 2", "stem.pach", "(value 2)", "Did you mean patch?"),
    Bad("type: patchify", "typ: patchify", "stem.typ", '(value "patchify")', "Did you mean type?"),
    Bad("num_classes: 3", "num_clases: 3", "head.num_clases", "(value 3)", "Did you mean num_classes?"),
    Bad("fusion: convnext", "fusion: {type: convnext, norm: no}", "fusion.norm", "(value false)", "Known keys"),
    Bad("init: 0.5", "int: 0.5", "gain.int", "unknown key (value 0.5)", "Did you mean init?"),
    Bad("heads: 3", "heads: 3, options: {dropout: 0.1}", "levels.1.options", '{"dropout": 0.1}', "Known keys are"),
    # keys that are missing
    Bad("columns: 2\n", "", "columns", "missing", "as in `columns: 4`"),
    Bad("stem: {type: patchify, patch: 2}\n", "", "stem", "missing", "{type: patchify, patch: 4}"),
    Bad(LEVELS, "", "levels", "missing", "as in `levels: [{dim: 64"),
    Bad("dim: 8, ", "", "levels.0.dim", "missing", "as in `dim: 64`"),
    Bad("depth: 1, ", "", "levels.0.depth", "missing", "as in `depth: 2`"),
    Bad(f", {CONVNEXT}", "", "levels.0.block", "missing", "as in `block: convnext`"),
    Bad("type: patchify, ", "", "stem.type", "missing", "as in `type: linear`"),
    Bad(", heads: 3", "", "levels.1.heads", 'block "vit" needs', "as in `heads: ...`"),
    Bad(", num_classes: 3", "", "head.num_classes", 'head "classifier" needs', "as in `num_classes: ...`"),
    # values of a wrong type
    Bad("columns: 2", "columns: many", "columns", '"many" is text', "Give a whole number"),
    Bad("columns: 2", "columns: '2'", "columns", '"2" is text', "without quotes"),
    Bad("columns: 2", "columns: 2.0", "columns", "2.0 is a decimal number", "Give a whole number"),
    Bad("columns: 2", "columns: yes", "columns", "true is a yes/no value", "Give a whole number"),
    Bad("columns: 2", "columns:", "columns", "no value", "Give a whole number"),
    Bad("columns: 2", "columns: [2, 4]", "columns", "[2, 4] is a list", "Give a whole number"),
    Bad("columns: 2", "columns: 2024-05-06", "columns", '"2024-05-06" is text', "Give a whole number"),
    Bad("columns: 2", "columns: 1e3", "columns", "YAML reads 1e3 as text", "Write 1000"),
    Bad("init: 0.5", "init: 1e-1", "gain.init", "YAML reads 1e-1 as text", "Write 1.0e-1"),
    Bad("init: 0.5", "init: 2.5E1", "gain.init", "YAML reads 2.5E1 as text", "Write 2.5e+1"),
    Bad("init: 0.5", "learn: 1", "gain.learn", "1 is a whole number", "Give true or false"),
    Bad("gain: {init: 0.5}", "gain: 0.5", "gain", "0.5 is a decimal number", "as in `gain: {init: 0.5}`"),
    Bad("stem: {type: patchify, patch: 2}", "stem: 4", "stem", "4 is a whole number", "{type: name, ...}"),
    Bad("stem: {type: patchify, patch: 2}", "stem:", "stem", "no value", "Give a name"),
    Bad("type: patchify", "type: 4", "stem.type", "4 is a whole number", "Give the name of a stem"),
    Bad("fusion: convnext", "fusion: [convnext]", "fusion", '["convnext"] is a list', "Give a name"),
    Bad("head: {type: classifier, num_classes: 3}", "head: no", "head", "false is a yes/no value", "Give a name"),
    Bad(LEVELS, "levels: {dim: 8}\n", "levels", '{"dim": 8} is a mapping', "Give a list"),
    Bad(LEVELS, "levels: [8, 12]\n", "levels.0", "8 is a whole number", "as in {dim: 64, depth: 2, block: convnext}"),
    Bad("block: vit", "block: [vit]", "levels.1.block", '["vit"] is a list', "Give the name of a block"),
    Bad("heads: 3", "heads: three", "levels.1.heads", '"three" is text', "Give a whole number"),
    Bad("heads: 3", "heads: true", "levels.1.heads", "true is a yes/no value", "Give a whole number"),
    Bad("heads: 3", "heads: 3, dropout: 1e-1", "levels.1.dropout", "YAML reads 1e-1 as text", "Write 1.0e-1"),
    Bad("taps: [0]", "taps: [first]", "taps", '"first" is text', "Give the number of a column"),
    Bad("reads: [below, above]", "reads: [below, true]", "reads", "true is a yes/no value", "Give below, above, stem"),
    Bad("reads: [below, above]", "reads:", "reads", "no value", "Give a list"),
    Bad("memory: exact", "memory: 7", "memory", "7 is a whole number", "Give store, recompute, invert, exact, a"),
    Bad("memory: exact", "memory: {budget: lots}", "memory.budget", '"lots" is no amount', "text such as 24GiB"),
    Bad("memory: exact", "memory: {budget: -1}", "memory.budget", "-1 is no amount", "Give a number of bytes"),
    Bad("memory: exact", "memory: {budget: 1.5}", "memory.budget", "1.5 is a decimal number", "Give a number of bytes"),
    Bad("memory: exact", "memory: {bugdet: 1GiB}", "memory.bugdet", "unknown key", "Did you mean budget?"),
    Bad("memory: exact", "memory: {ranks: 2}", "memory.budget", "this key is missing", "`budget: 24GiB`"),
    Bad("memory: exact", "memory: {budget: 1GiB, ranks: 0}", "memory.ranks", "0 is too small", "at least 1"),
    Bad("memory: exact", "memory: {budget: 1GiB, sharding: zero}", "memory.sharding", '"zero"', "among ddp, fsdp"),
    Bad("memory: exact", "memory: {budget: 1GiB, optimizer: adm}", "memory.optimizer", '"adm"', "mean adam?"),
    # values out of range
    Bad("columns: 2", "columns: 0", "columns", "0 is too small", "Give at least 1"),
    Bad("columns: 2", "columns: 10001", "columns", "10001 is too large", "Give at most 10000"),
    Bad("depth: 1", "depth: 9999999999", "levels.0.depth", "9999999999 is too large", "Give at most 10000"),
    Bad("dim: 8", "dim: -8", "levels.0.dim", "-8 is too small", "Give at least 1"),
    Bad("depth: 1", "depth: -1", "levels.0.depth", "-1 is too small", "Give at least 0"),
    Bad("depth: 1", "depth: 1, stride: 0", "levels.0.stride", "0 is too small", "Give at least 1"),
    Bad("patch: 2", "patch: 0", "stem.patch", "0 is too small", "Give at least 1"),
    Bad("num_classes: 3", "num_classes: 0", "head.num_classes", "0 is too small", "Give at least 1"),
    Bad("drop_path: 0.1", "drop_path: 1", "drop_path", "1 is too large", "Give less than 1"),
    Bad("drop_path: 0.1", "drop_path: -0.1", "drop_path", "-0.1 is too small", "Give at least 0"),
    Bad("heads: 3", "heads: 3, drop_path: 1.5", "levels.1.drop_path", "1.5 is too large", "Give less than 1"),
    Bad("init: 0.5", "init: .inf", "gain.init", "inf is not a finite number", "Give a finite one"),
    Bad("heads: 3", "heads: 3, mlp_ratio: .nan", "levels.1.mlp_ratio", "nan is not a finite number", "Give a"),
    Bad("init: 0.5", "init: 0.0001", "gain.init", "0.0001 is nearer to 0 than min_abs", "or at most -0.001"),
    Bad("init: 0.5", "init: 0, learn: false", "gain.init", "0.0 is nearer to 0 than min_abs", "Give at least 0.001"),
    Bad("init: 0.5", "min_abs: 0", "gain.min_abs", "0 is too small", "Give more than 0"),
    # reads, taps, memory
    Bad("[below, above]", "[below, 2]", "reads", "offset 2 reaches out of the window of 2 levels", "Give 1"),
    Bad("depth: 1", "depth: 1, reads: [0]", "levels.0.reads", "offset 0 reaches out of the window", "Give 1"),
    Bad("[below, above]", "[below, abov]", "reads", '"abov" is not a read', "Did you mean above?"),
    Bad("[below, above]", "sideways", "reads", '"sideways" is not a read', "Choose among below, above"),
    Bad("[below, above]", "[]", "reads", "the list is empty", "Give some of below, above"),
    Bad("taps: [0]", "taps: [0, 2]", "taps", "there is no column 2", "Columns are numbered from 0 to 1"),
    Bad("taps: [0]", "taps: -1", "taps", "there is no column -1", "Columns are numbered from 0 to 1"),
    Bad("memory: exact", "memory: exakt", "memory", '"exakt" is not a memory mode', "Did you mean exact?"),
    Bad("memory: exact", "memory: [exact]", "memory", "1 modes for 2 columns", "Give one for all, or one per column"),
    Bad(LEVELS.splitlines()[1] + "\n", "", "levels", "a column of 1 level cannot be reversed", "Give at least 2"),
    Bad(LEVELS, "levels: []\n", "levels", "a column of 0 levels", "Give at least 2"),
    # parts that do not exist
    Bad("block: convnext", "block: convnex", "levels.0.block", 'no block "convnex"', "Did you mean convnext?"),
    Bad("type: patchify", "type: unfold", "stem.type", 'no stem "unfold"', "linear, patchify, tokens"),
    Bad("type: classifier", "type: clasifier", "head.type", 'no head "clasifier"', "Did you mean classifier?"),
    Bad("fusion: convnext", "fusion: liner", "fusion", 'no fusion "liner"', "Did you mean linear?"),
    Bad(CONVNEXT, "block: torch.nn.Identity", "levels.0.block", '"torch.nn.Identity"', "torch.nn:Identity"),
    Bad(CONVNEXT, "block: 'torch.nm:Identity'", "levels.0.block", "no module torch.nm", "Check its spelling"),
    Bad(CONVNEXT, "block: 'torch.nn:Identit'", "levels.0.block", 'no "Identit"', "Did you mean Identity?"),
    Bad(CONVNEXT, "block: 'math:pi'", "levels.0.block", "pi is of type float", "Classes and functions of the module"),
    Bad(CONVNEXT, "block: 'torch.nn:Linear'", "levels.0.block", "does not take the argument `dim`", "Add dim"),
    Bad("patch: 2", "patch: 2, dim: 64", "stem.dim", 'stem "patchify" is given dim', "Remove the key"),
    # parts that refuse what they are given
    Bad("heads: 3", "heads: 5", "levels.1", "12 channels do not divide into 5 heads", ""),
    Bad("kernel_size: 3", "kernel_size: 4", "levels.0", "kernel_size 4 would change the size", ""),
    Bad("fusion: convnext", "fusion: identity", "fusion", "one has 8 channels and the level 12", ""),
    Bad("heads: 3}\nfusion: convnext", "heads: 3, stride: 2}\nfusion: linear", "fusion", "1/1 into 1/2", ""),
    Bad("fusion: convnext", "fusion: {type: linear, project: [abov]}", "fusion.project.0", '"abov"', "Choose 'stem'"),
    Bad("dim: 8", "dim: 1000000000000000000000", "stem", "TypeError: empty()", ""),
    Bad("block: vit, heads: 3", "block: 'torch.nn:Module'", "levels.1", "TypeError", ""),
    Bad("block: vit, heads: 3", "block: 'builtins:dict'", "levels.1.block", "does not say what arguments", "Wrap it"),
    Bad("block: vit, heads: 3", "block: 'argparse:Namespace'", "levels.1", "gives a Namespace", "torch.nn.Module"),
    Bad(LEVELS, f"levels:\n{2 * IDENTITY}", "drop_path", "no block takes the rate 0.1", "Remove the key"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad.key}-{bad.new.strip()[:40]}")
def test_bad_value(tmp_path: Path, bad: Bad) -> None:
    assert GOOD.count(bad.old) >= 1
    file = tmp_path / "net.yaml"
    file.write_text(GOOD.replace(bad.old, bad.new, 1))
    with pytest.raises(revnets.SpecError) as caught:
        revnets.build(file)
    error, message = caught.value, str(caught.value)
    assert "\n" not in message
    assert (error.source, error.key) == (str(file), bad.key)
    assert bad.value in error.problem
    assert bad.remedy in error.remedy
    assert bool(bad.remedy) == bool(error.remedy)
    assert message == f"{file}: {bad.key}: {error.problem}" + (f". {error.remedy}" if error.remedy else "")


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
        {}["colour"]

def nothing(dim):
    return None
"""


@pytest.mark.parametrize(
    ("name", "block", "problem"),
    [
        ("levels.0.block", "own_blocks:Clashes", "argument stride of block"),
        ("levels.0.block", "own_blocks:TABLE", "TABLE is of type dict, not a class"),
        ("levels.0.block", "own_blocks:", 'module own_blocks has no ""'),
        ("levels.0.block", ":Strange", "Empty module name"),
        ("levels.0.block", "own_blocks:Strange:X", 'has no "Strange:X"'),
        ("levels.0.block", "..own_blocks:Strange", "relative import"),
        ("levels.0.block", "raises:Block", "ZeroDivisionError: division by zero in raises.py, line 3"),
        ("levels.0.block", "exits:Block", "SystemExit: 3 in exits.py, line 2"),
        ("levels.0.block", "unparsable:Block", "SyntaxError: invalid syntax (unparsable.py, line 1)"),
        ("levels.0.block", "lacking:Block", "No module named 'nothing_of_that_name'"),
        ("levels.0", "own_blocks:Picky", 'block "own_blocks:Picky": no 8 for me'),
        ("levels.0", "own_blocks:Broken", "KeyError: 'colour'"),
        ("levels.0", "own_blocks:nothing", "gives a NoneType"),
    ],
)
def test_bad_block_of_ones_own(own_modules: Path, name: str, block: str, problem: str) -> None:
    (own_modules / "own_blocks.py").write_text(OWN_BLOCKS)
    (own_modules / "raises.py").write_text("def f():\n    1\n    return 1 / 0\n\nf()\n")
    (own_modules / "exits.py").write_text("import sys\nsys.exit(3)\n")
    (own_modules / "unparsable.py").write_text("class Block(:\n")
    (own_modules / "lacking.py").write_text("import nothing_of_that_name\n")
    file = own_modules / "net.yaml"
    file.write_text(GOOD.replace(CONVNEXT, f"block: '{block}'", 1))
    with pytest.raises(revnets.SpecError) as caught:
        revnets.build(file)
    assert caught.value.key == name
    assert problem in caught.value.problem
    assert "\n" not in str(caught.value)


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
def test_any_values_give_a_net_or_one_clear_line(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    data = yaml.safe_load(GOOD)
    for keys, value in changes:
        place: Any = data
        with suppress(LookupError, TypeError):  # an earlier change took the place away
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
