"""Specification of columns and of whole networks, validated without building them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from revnets.config.column_order import MAX_COUNT, ConstantSpec, Directions, count_columns, one_or_per_column
from revnets.config.errors import nearest, problem, what
from revnets.config.loader import Overrides, Source, Strict, read_layers
from revnets.config.memory_budget import BudgetSpec
from revnets.config.overrides import apply_overrides
from revnets.config.registry import PartSpec, find_component, name_and_options, options, part
from revnets.engine.graph import READS, Graph, ReadError, ReadToken, wire
from revnets.engine.memory_mode import Memory


def _some(kind: type | tuple[type, ...], wanted: str) -> BeforeValidator:
    """Return a validator that accepts a list, or a single item for a list of one."""

    def check(value: Any) -> Any:
        if value is None:
            return value
        items = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        for item in items:
            if isinstance(item, bool) or not isinstance(item, kind):
                raise problem(what(item), f"Give {wanted}, or a list of these", code="wrong-type")
        return items

    return BeforeValidator(check)


def _some_levels(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise problem(what(value), "Give a list of levels", code="wrong-type")
    if len(value) > MAX_LEVELS:
        raise problem(f"{len(value)} levels are too many", f"Give at most {MAX_LEVELS}", code="out-of-range")
    return tuple(value)


Reads = Annotated[tuple[ReadToken, ...], _some((str, int), f"{', '.join(READS)} or an offset")]
Modes = Annotated[
    Annotated[str | tuple[str, ...], Tag("modes")] | Annotated[BudgetSpec, Tag("mapping")],
    Discriminator(lambda value: "mapping" if isinstance(value, (dict, BudgetSpec)) else "modes"),
    one_or_per_column("memory mode", [*Memory], ", or {budget: 24GiB}"),
]
Columns = Annotated[tuple[int, ...], _some(int, "the number of a column")]

MAX_LEVELS, MAX_SIZE = 256, 10_000
"""Largest number of levels per column, and of cells and blocks or of connections of a network."""


class LevelSpec(Strict):
    """One level of every column. None means the default of the network; docs/reference/yaml.md describes every key."""

    dim: int = Field(ge=1, examples=[64])
    depth: int = Field(ge=0, le=MAX_COUNT, examples=[2])
    block: str = Field(examples=["convnext"])
    stride: int | None = Field(default=None, ge=1)
    reads: Reads | None = None
    residual: int | None = Field(default=None, ge=0)
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _split(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict):
            if isinstance(value, cls):
                return value
            raise problem(what(value), "Give a mapping, as in {dim: 64, depth: 2, block: convnext}", code="wrong-type")
        level = {key: item for key, item in value.items() if key in LEVEL_KEYS}
        _, options = name_and_options("block", value, "block", LEVEL_KEYS, info)
        return {**level, "options": options}


LEVEL_KEYS = tuple(key for key in LevelSpec.model_fields if key != "options")
"""Keys of a level. All other keys are options of its block."""


class Initialization(NamedTuple):
    """Initial values of the factors that scale states and residual branches."""

    gain: float  # gamma
    layer_scale: float | None  # of blocks with this option, or None for the default of the block


INITIALIZATIONS = {"paper": Initialization(0.5, None), "fast": Initialization(1.0, 1.0)}
"""Initializations by name: that of RevCol (section 2.2.2), and one for short runs (docs/results/initialization.md)."""


class GainSpec(Strict):
    """The factor gamma of every level: its initial value, the lower bound of |gamma|, and whether it is learned."""

    init: float = 0.5
    min_abs: float = Field(default=1e-3, gt=0)
    learn: bool = True

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if abs(self.init) < self.min_abs:
            remedy = f"Give at least {self.min_abs} or at most -{self.min_abs}, or lower min_abs"
            raise problem(f"{self.init} is closer to 0 than min_abs", remedy, "init", code="out-of-range")
        return self


class _ColumnCount(Strict):
    columns: int = Field(ge=1, le=MAX_COUNT, examples=[4])

    @model_validator(mode="before")
    @classmethod
    def _count(cls, data: Any) -> Any:
        return count_columns(data) if isinstance(data, dict) and isinstance(data.get("columns"), dict) else data


class _Stem(_ColumnCount):
    stem: Annotated[PartSpec, part("stem")] = Field(
        examples=["{type: patchify, patch: 4}", "{type: linear, in_dim: 64}"]  # of images, and of sequences
    )


# Pydantic orders keys by base class. The base classes above produce the order columns, stem, levels.
class ColumnsSpec(_ColumnCount):
    """Reversible columns without stem and head, for models that have their own.

    Only `columns` and `levels` are required. docs/reference/yaml.md describes every key.
    """

    model_config = ConfigDict(title="columns")

    levels: Annotated[tuple[LevelSpec, ...], BeforeValidator(_some_levels)] = Field(
        examples=["[{dim: 64, depth: 2, block: convnext}, ...]"]
    )
    fusion: Annotated[PartSpec, part("fusion")] = PartSpec(type="convnext")
    reads: Reads = ("below", "above")
    residual: int | None = Field(default=None, ge=0)
    direction: Directions = "up"
    constant: ConstantSpec | None = Field(default=None, examples=["{column: 2}"])
    gain: GainSpec = Field(default=GainSpec(), examples=["{init: 0.5}"])
    memory: Modes = "exact"
    verify: bool = False
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    init: Literal["paper", "fast"] = "paper"

    @model_validator(mode="before")
    @classmethod
    def _fill_gain(cls, data: Any) -> Any:
        """Set the initial gamma of `init` unless it is given."""
        if not isinstance(data, dict) or data.get("init") != "fast":
            return data
        gain = data.get("gain", {})
        return {**data, "gain": {"init": INITIALIZATIONS["fast"].gain, **gain}} if isinstance(gain, dict) else data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        m = len(self.levels)
        if m < 2:
            raise problem(
                f"a column of {m} level{'s' * (m != 1)} cannot be reversed",
                "Give at least 2",
                "levels",
                code="wrong-length",
            )
        self._check_size()
        self._check_directions()
        _check_reads(self.reads, m, "reads")
        for index, level in enumerate(self.levels):
            if level.reads is not None:
                _check_reads(level.reads, m, "levels", index, "reads")
        self._check_residuals()
        if isinstance(self.memory, tuple) and len(self.memory) != self.columns:
            text = f"{len(self.memory)} modes for {self.columns} columns"
            raise problem(text, "Give one for all, or one per column", "memory", code="wrong-length")
        if self.drop_path and not any(_takes(level, "drop_path") for level in self.levels):
            text = f"no block has this option (value {self.drop_path})"
            raise problem(text, "Remove the key", "drop_path", code="conflicting-values")
        return self

    def graph(self) -> Graph:
        """Return the graph: nodes and connections of all columns."""
        m = len(self.levels)
        reads = [self.reads if level.reads is None else level.reads for level in self.levels]
        constant = None if self.constant is None else self.constant.column
        return wire(self.columns * m, m, reads, self.residuals(), self.directions, constant)

    @property
    def directions(self) -> tuple[str, ...]:
        """Direction of each column: `up` or `down`."""
        return (self.direction,) * self.columns if isinstance(self.direction, str) else self.direction

    def residuals(self) -> list[int]:
        """Return how many states back the residual of each level is, 0 for none."""
        default = len(self.levels) if self.residual is None else self.residual
        return [default if level.residual is None else level.residual for level in self.levels]

    def _check_size(self) -> None:
        m, blocks = len(self.levels), sum(level.depth for level in self.levels)
        reads = [self.reads if level.reads is None else level.reads for level in self.levels]
        # Connections beyond the two of a RevCol cell: `full` and `before` connect all levels.
        wires = sum(m if token in ("full", "before") else 1 for tokens in reads for token in tokens) - 2 * m
        for kind, count in (("cells and blocks", m + blocks), ("connections", wires)):
            if self.columns * count > MAX_SIZE:
                text = f"{self.columns} columns of {m} levels have {self.columns * count:,} {kind}"
                remedy = f"Give fewer columns, levels or blocks: at most {MAX_SIZE:,}"
                raise problem(text, remedy, "columns", code="out-of-range")

    def _check_directions(self) -> None:
        if len(self.directions) != self.columns:
            text = f"{len(self.directions)} directions for {self.columns} columns"
            raise problem(text, "Give one for all, or one per column", "direction", code="wrong-length")
        if self.directions[0] == "down":
            remedy = "The first column must run up: the output of the stem enters at its level 0"
            raise problem("the first column runs down", remedy, "direction", code="conflicting-values")
        if self.constant is not None and self.constant.column >= self.columns:
            raise _no_column(self.constant.column, self.columns, "constant", "column")

    def _check_residuals(self) -> None:
        m, shapes = len(self.levels), list(zip((level.dim for level in self.levels), self.reductions(), strict=True))
        for index, back in enumerate(self.residuals()):
            place = ("residual",) if self.levels[index].residual is None else ("levels", index, "residual")
            if back > m:
                raise problem(
                    f"{back} is more than the {m} levels of a column",
                    f"Give at most {m}, or 0 for none",
                    *place,
                    code="out-of-range",
                )
            others = [shapes[(index - back) % m]] if index >= back or "up" in self.directions[1:] else []
            others += [shapes[(index + back) % m]] if "down" in self.directions else []  # in mirrored order
            for other in (other for other in others if other != shapes[index]):
                (dim, reduction), (dim_here, reduction_here) = other, shapes[index]
                text = f"the residual {back} states back has {dim} channels at 1/{reduction} of the stem's resolution, "
                text += f"but this level has {dim_here} at 1/{reduction_here}"
                raise problem(text, "Give 0 for no residual", "levels", index, "residual", code="shape-mismatch")
        try:
            self.graph()
        except ReadError as error:
            raise problem(
                str(error), "See docs/reference/yaml.md on residuals", "reads", code="conflicting-values"
            ) from None

    def reductions(self) -> list[int]:
        """Return the factor per side by which the resolution of each level is below that of the stem's output."""
        default = getattr(find_component("fusion", self.fusion.type), "default_stride", 1)
        found, reduction = [], 1
        for index, level in enumerate(self.levels):
            reduction *= level.stride or (default if index else 1)
            found.append(reduction)
        return found

    def drop_path_rates(self) -> list[list[float]]:
        """Return the rate of each block by level: from 0 to `drop_path` within a column, equal in all columns.

        This is the rule of the official release. Blocks with `drop_path` among their own options keep it.
        """
        total = sum(level.depth for level in self.levels)
        rates = iter([self.drop_path * index / max(total - 1, 1) for index in range(total)])
        return [
            [rate if _takes(level, "drop_path") else 0.0 for rate in islice(rates, level.depth)]
            for level in self.levels
        ]

    def block_options(self, level: LevelSpec) -> dict[str, Any]:
        """Return the options of the blocks of a level, with the layer scale of `init` unless it is given."""
        scale = INITIALIZATIONS[self.init].layer_scale
        is_missing = scale is not None and _takes(level, "layer_scale")
        return {"layer_scale": scale, **level.options} if is_missing else level.options


class NetSpec(ColumnsSpec, _Stem):
    """A whole network. Only `columns`, `stem` and `levels` are required; docs/reference/yaml.md describes every key."""

    model_config = ConfigDict(title="net")

    taps: Columns = ()
    head: Annotated[PartSpec, part("head")] | None = None

    @model_validator(mode="after")
    def _taps_exist(self) -> Self:
        for tap in self.taps:
            if not 0 <= tap < self.columns:
                raise _no_column(tap, self.columns, "taps")
        return self


def load_spec(source: Source | NetSpec, overrides: Overrides = (), *, trust: bool = True) -> NetSpec:
    """Read and validate the specification of a network.

    Args:
        source: Path of a YAML file, a mapping of the same form, or a spec.
        overrides: Texts `key.path=value`, such as `levels.2.depth=6`, or a mapping of key paths to values.
        trust: Whether it may name classes of other projects. Importing their modules runs their code.

    Raises:
        revnets.SpecError: If a file, key or value is invalid.
    """
    if isinstance(source, NetSpec):
        if trust and not overrides:
            return source
        source = dump(source)  # to validate it again
    layers = read_layers(source)
    if overrides:
        apply_overrides(layers, overrides)
    return layers.check(NetSpec, trust=trust)


def dump(spec: ColumnsSpec) -> dict[str, Any]:
    """Return a spec as plain data that can be loaded again. Default values are omitted."""

    def flat(part: dict[str, Any]) -> dict[str, Any]:
        return {key: item for key, item in part.items() if key != "options"} | part.get("options", {})

    data = spec.model_dump(exclude_defaults=True)
    usual = GainSpec(init=INITIALIZATIONS[spec.init].gain)
    data["gain"] = {key: value for key, value in spec.gain if value != getattr(usual, key)}
    if not data["gain"]:
        del data["gain"]
    data |= {key: flat(data[key]) for key in ("stem", "fusion", "head") if key in data}
    return data | {"levels": [flat(level) for level in data["levels"]]}


def _no_column(column: int, columns: int, *place: str) -> PydanticCustomError:
    remedy = f"Columns are numbered from 0 to {columns - 1}"
    return problem(f"there is no column {column}", remedy, *place, code="out-of-range")


def _check_reads(reads: Sequence[ReadToken], m: int, *place: str | int) -> None:
    if not reads:
        raise problem("the list is empty", f"Give some of {', '.join(READS)}", *place, code="wrong-length")
    for read in reads:
        if isinstance(read, str) and read not in READS:
            raise problem(
                f'"{read}" is not a valid input', nearest(read, READS, "Choose among"), *place, code="unknown-choice"
            )
        try:
            wire(m, m, [[read]] * m)
        except ReadError:
            text = f"offset {read} is outside the window of {m} levels"
            raise problem(text, f"Give 1 to {m - 1}" if m > 2 else "Give 1", *place, code="out-of-range") from None


def _takes(level: LevelSpec, option: str) -> bool:
    """Whether the blocks of a level have this option and it is not given."""
    return option in options("block", level.block) and option not in level.options
