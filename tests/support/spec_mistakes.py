"""A valid specification, and one for each mistake."""

from __future__ import annotations

import re
from typing import NamedTuple

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


class Mistake(NamedTuple):
    """One mistake: a replacement in GOOD, and the expected error."""

    old: str
    new: str
    key: str
    code: str
    names: tuple[str, ...]  # values, keys and suggestions that its message must contain

    @property
    def text(self) -> str:
        assert GOOD.count(self.old) >= 1
        return GOOD.replace(self.old, self.new, 1)

    def lacks(self, text: str) -> list[str]:
        """Return the names that a text does not contain as whole words."""
        return [name for name in self.names if not re.search(rf"(?<![\w.-]){re.escape(name)}(?!\w)", text)]


def bad(old: str, new: str, key: str, code: str, *names: str) -> Mistake:
    return Mistake(old, new, key, code, names)


LEVELS = GOOD[GOOD.index("levels:") : GOOD.index("fusion:")]
CONVNEXT = "block: convnext, kernel_size: 3"
IDENTITY = "  - {dim: 8, depth: 1, block: 'torch.nn:Identity'}\n"

MISTAKES = [
    # unknown keys
    bad("columns: 2", "colums: 2", "colums", "unknown-key", "2", "mean columns?"),
    bad("memory: exact", "zoo: red", "zoo", "unknown-key", '"red"', "columns, stem, levels"),
    bad("kernel_size", "kernal_size", "levels.0.kernal_size", "unknown-key", "3", "mean kernel_size?"),
    bad("depth: 1", "dept: 1", "levels.0.dept", "unknown-key", "1", "mean depth?"),
    bad("block: convnext", "blok: convnext", "levels.0.blok", "unknown-key", '"convnext"', "mean block?"),
    bad("patch: 2", "pach: 2", "stem.pach", "unknown-key", "2", "mean patch?"),
    bad("type: patchify", "typ: patchify", "stem.typ", "unknown-key", '"patchify"', "mean type?"),
    bad("num_classes: 3", "num_clases: 3", "head.num_clases", "unknown-key", "3", "mean num_classes?"),
    bad("fusion: convnext", "fusion: {type: convnext, norm: no}", "fusion.norm", "unknown-key", "false"),
    bad("init: 0.5", "int: 0.5", "gain.int", "unknown-key", "0.5", "mean init?"),
    bad(
        "heads: 3",
        "heads: 3, options: {dropout: 0.1}",
        "levels.1.options",
        "unknown-key",
        '{"dropout": 0.1}',
        "dim, depth, block",
    ),
    # missing keys
    bad("columns: 2\n", "", "columns", "missing-key", "`columns: 4`"),
    bad("stem: {type: patchify, patch: 2}\n", "", "stem", "missing-key", "{type: patchify, patch: 4}"),
    bad(LEVELS, "", "levels", "missing-key", "{dim: 64"),
    bad("dim: 8, ", "", "levels.0.dim", "missing-key", "`dim: 64`"),
    bad("depth: 1, ", "", "levels.0.depth", "missing-key", "`depth: 2`"),
    bad(f", {CONVNEXT}", "", "levels.0.block", "missing-key", "`block: convnext`"),
    bad("type: patchify, ", "", "stem.type", "missing-key", "`type: linear`"),
    bad(", heads: 3", "", "levels.1.heads", "missing-key", '"vit"', "`heads: ...`"),
    bad(", num_classes: 3", "", "head.num_classes", "missing-key", '"classifier"', "`num_classes: ...`"),
    # values of a wrong type
    bad("columns: 2", "columns: many", "columns", "wrong-type", '"many"'),
    bad("columns: 2", "columns: '2'", "columns", "number-as-text", '"2"'),
    bad("columns: 2", "columns: 2.0", "columns", "wrong-type", "2.0"),
    bad("columns: 2", "columns: yes", "columns", "wrong-type", "true"),
    bad("columns: 2", "columns:", "columns", "wrong-type", "null"),
    bad("columns: 2", "columns: [2, 4]", "columns", "wrong-type", "[2, 4]"),
    bad("columns: 2", "columns: 2024-05-06", "columns", "wrong-type", '"2024-05-06"'),
    bad("columns: 2", "columns: 1e3", "columns", "number-as-text", "1e3", "1000"),
    bad("init: 0.5", "init: 1e-1", "gain.init", "number-as-text", "1e-1", "1.0e-1"),
    bad("init: 0.5", "init: 2.5E1", "gain.init", "number-as-text", "2.5E1", "2.5e+1"),
    bad("init: 0.5", "learn: 1", "gain.learn", "wrong-type", "1"),
    bad("gain: {init: 0.5}", "gain: 0.5", "gain", "wrong-type", "0.5", "`gain: {init: 0.5}`"),
    bad("stem: {type: patchify, patch: 2}", "stem: 4", "stem", "wrong-type", "4", "{type: name, ...}"),
    bad("stem: {type: patchify, patch: 2}", "stem:", "stem", "wrong-type", "null"),
    bad("type: patchify", "type: 4", "stem.type", "wrong-type", "4"),
    bad("fusion: convnext", "fusion: [convnext]", "fusion", "wrong-type", '["convnext"]'),
    bad("head: {type: classifier, num_classes: 3}", "head: no", "head", "wrong-type", "false"),
    bad(LEVELS, "levels: {dim: 8}\n", "levels", "wrong-type", '{"dim": 8}'),
    bad(LEVELS, "levels: [8, 12]\n", "levels.0", "wrong-type", "8", "{dim: 64, depth: 2, block: convnext}"),
    bad("block: vit", "block: [vit]", "levels.1.block", "wrong-type", '["vit"]'),
    bad("heads: 3", "heads: three", "levels.1.heads", "wrong-type", '"three"'),
    bad("heads: 3", "heads: true", "levels.1.heads", "wrong-type", "true"),
    bad("heads: 3", "heads: 3, dropout: 1e-1", "levels.1.dropout", "number-as-text", "1e-1", "1.0e-1"),
    bad("taps: [0]", "taps: [first]", "taps", "wrong-type", '"first"'),
    bad("reads: [below, above]", "reads: [below, true]", "reads", "wrong-type", "true", "below, above, stem"),
    bad("reads: [below, above]", "reads:", "reads", "wrong-type", "null"),
    bad("memory: exact", "memory: 7", "memory", "wrong-type", "7", "store, recompute, invert, exact"),
    bad("memory: exact", "memory: {budget: lots}", "memory.budget", "invalid-value", '"lots"', "24GiB"),
    bad("memory: exact", "memory: {budget: -1}", "memory.budget", "invalid-value", "-1"),
    bad("memory: exact", "memory: {budget: 1.5}", "memory.budget", "wrong-type", "1.5"),
    bad("memory: exact", "memory: {bugdet: 1GiB}", "memory.bugdet", "unknown-key", "mean budget?"),
    bad("memory: exact", "memory: {ranks: 2}", "memory.budget", "missing-key", "`budget: 24GiB`"),
    bad("memory: exact", "memory: {budget: 1GiB, ranks: 0}", "memory.ranks", "out-of-range", "0", "1"),
    bad(
        "memory: exact",
        "memory: {budget: 1GiB, sharding: zero}",
        "memory.sharding",
        "unknown-choice",
        '"zero"',
        "ddp, fsdp",
    ),
    bad(
        "memory: exact",
        "memory: {budget: 1GiB, optimizer: adm}",
        "memory.optimizer",
        "unknown-choice",
        '"adm"',
        "mean adam?",
    ),
    # values out of range
    bad("columns: 2", "columns: 0", "columns", "out-of-range", "0", "1"),
    bad("columns: 2", "columns: 10001", "columns", "out-of-range", "10001", "10000"),
    bad("depth: 1", "depth: 9999999999", "levels.0.depth", "out-of-range", "9999999999", "10000"),
    bad("dim: 8", "dim: -8", "levels.0.dim", "out-of-range", "-8", "1"),
    bad("depth: 1", "depth: -1", "levels.0.depth", "out-of-range", "-1", "0"),
    bad("depth: 1", "depth: 1, stride: 0", "levels.0.stride", "out-of-range", "0", "1"),
    bad("patch: 2", "patch: 0", "stem.patch", "out-of-range", "0", "1"),
    bad("num_classes: 3", "num_classes: 0", "head.num_classes", "out-of-range", "0", "1"),
    bad("drop_path: 0.1", "drop_path: 1", "drop_path", "out-of-range", "1"),
    bad("drop_path: 0.1", "drop_path: -0.1", "drop_path", "out-of-range", "-0.1", "0"),
    bad("heads: 3", "heads: 3, drop_path: 1.5", "levels.1.drop_path", "out-of-range", "1.5", "1"),
    bad("init: 0.5", "init: .inf", "gain.init", "not-finite", "inf"),
    bad("heads: 3", "heads: 3, mlp_ratio: .nan", "levels.1.mlp_ratio", "not-finite", "nan"),
    bad("init: 0.5", "init: 0.0001", "gain.init", "out-of-range", "0.0001", "min_abs", "0.001", "-0.001"),
    bad("init: 0.5", "init: 0, learn: false", "gain.init", "out-of-range", "0.0", "min_abs", "0.001", "-0.001"),
    bad("init: 0.5", "min_abs: 0", "gain.min_abs", "out-of-range", "0"),
    # inputs, taps, memory
    bad("[below, above]", "[below, 2]", "reads", "out-of-range", "2", "1"),
    bad("depth: 1", "depth: 1, reads: [0]", "levels.0.reads", "out-of-range", "0", "1"),
    bad("[below, above]", "[below, abov]", "reads", "unknown-choice", '"abov"', "mean above?"),
    bad("[below, above]", "sideways", "reads", "unknown-choice", '"sideways"', "below, above, stem"),
    bad("[below, above]", "[]", "reads", "wrong-length", "below, above, stem"),
    bad("taps: [0]", "taps: [0, 2]", "taps", "out-of-range", "2", "0", "1"),
    bad("taps: [0]", "taps: -1", "taps", "out-of-range", "-1", "0", "1"),
    bad("memory: exact", "memory: exakt", "memory", "unknown-choice", '"exakt"', "mean exact?"),
    bad("memory: exact", "memory: [exact]", "memory", "wrong-length", "1", "2"),
    bad(LEVELS.splitlines()[1] + "\n", "", "levels", "wrong-length", "1", "2"),
    bad(LEVELS, "levels: []\n", "levels", "wrong-length", "0", "2"),
    # components that do not exist
    bad("block: convnext", "block: convnex", "levels.0.block", "unknown-component", '"convnex"', "mean convnext?"),
    bad(
        "type: patchify",
        "type: unfold",
        "stem.type",
        "unknown-component",
        '"unfold"',
        "linear, patch_embed, patchify, tokens",
    ),
    bad("type: classifier", "type: clasifier", "head.type", "unknown-component", '"clasifier"', "mean classifier?"),
    bad("fusion: convnext", "fusion: liner", "fusion", "unknown-component", '"liner"', "mean linear?"),
    bad(
        CONVNEXT,
        "block: torch.nn.Identity",
        "levels.0.block",
        "unknown-component",
        '"torch.nn.Identity"',
        "torch.nn:Identity",
    ),
    bad(CONVNEXT, "block: 'torch.nm:Identity'", "levels.0.block", "missing-module", "torch.nm"),
    bad(CONVNEXT, "block: 'torch.nn:Identit'", "levels.0.block", "unknown-component", '"Identit"', "mean Identity?"),
    bad(CONVNEXT, "block: 'math:pi'", "levels.0.block", "invalid-component", "math:pi", "pi", "float"),
    bad(CONVNEXT, "block: 'torch.nn:Linear'", "levels.0.block", "invalid-component", "torch.nn:Linear", "`dim`"),
    bad("patch: 2", "patch: 2, dim: 64", "stem.dim", "reserved-key", '"patchify"', "dim"),
    # components that reject their options
    bad("heads: 3", "heads: 5", "levels.1", "not-divisible", "12", "5"),
    bad("kernel_size: 3", "kernel_size: 4", "levels.0", "invalid-value", "kernel_size 4"),
    bad("fusion: convnext", "fusion: identity", "fusion", "shape-mismatch", "8", "12"),
    bad(
        "heads: 3}\nfusion: convnext", "heads: 3, stride: 2}\nfusion: linear", "fusion", "shape-mismatch", "1/1", "1/2"
    ),
    bad(
        "fusion: convnext",
        "fusion: {type: linear, project: [abov]}",
        "fusion.project.0",
        "unknown-choice",
        '"abov"',
        "'stem'",
    ),
    bad("dim: 8", "dim: 1000000000000000000000", "stem", "component-failed", "TypeError"),
    bad(
        "block: vit, heads: 3",
        "block: 'torch.nn:Module'",
        "levels.1",
        "component-failed",
        "torch.nn:Module",
        "TypeError",
    ),
    bad("block: vit, heads: 3", "block: 'builtins:dict'", "levels.1.block", "invalid-component", "builtins:dict"),
    bad(
        "block: vit, heads: 3",
        "block: 'argparse:Namespace'",
        "levels.1.block",
        "invalid-component",
        "argparse:Namespace",
        "torch.nn.Module",
    ),
    bad(LEVELS, f"levels:\n{2 * IDENTITY}", "drop_path", "conflicting-values", "0.1"),
]
