"""The configuration of a language model, with the names of Hugging Face, and the columns that it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from transformers import PreTrainedConfig

from revnets import ColumnsSpec, SpecError
from revnets.config.column_order import MAX_COUNT
from revnets.config.errors import first_line
from revnets.config.loader import Layers, Strict, read_layers
from revnets.config.net_spec import MAX_LEVELS, MAX_SIZE, Modes, dump
from revnets.nn.blocks import Rate

from .architectures import SOURCE  # whose blocks are registered then

MAX_WIDTH, MAX_WORDS, MAX_POSITIONS = 2**17, 2**24, 2**24
"""Bounds of channels, of the vocabulary and of the length of a text: larger numbers are typing errors."""


FUSION = {"type": "linear", "project": ["above"]}


class Sizes(Strict):
    """What is checked of a `RevColLMConfig` before anything is built from it."""

    vocab_size: int = Field(ge=1, le=MAX_WORDS)
    hidden_size: int = Field(ge=2, le=MAX_WIDTH)
    architecture: Literal["columns", "midpoint"]
    columns: int = Field(ge=1, le=MAX_COUNT)
    levels: int = Field(ge=2, le=MAX_LEVELS)
    depth: int = Field(ge=1, le=MAX_COUNT)
    num_attention_heads: int = Field(ge=1, le=MAX_WIDTH)
    num_key_value_heads: int | None = Field(ge=1, le=MAX_WIDTH)
    intermediate_size: int | None = Field(ge=1, le=4 * MAX_WIDTH)
    hidden_act: Literal["silu", "gelu"]
    norm_type: Literal["rms", "layer"]
    norm_eps: float = Field(gt=0, lt=1)
    use_bias: bool
    max_position_embeddings: int = Field(ge=1, le=MAX_POSITIONS)
    rope_theta: float = Field(gt=0)
    hidden_dropout: Rate
    attention_dropout: Rate
    initializer_range: float = Field(gt=0, le=1)
    tie_word_embeddings: bool
    memory: Modes
    supervised_columns: tuple[int, ...]
    supervision_weight: float = Field(ge=0)
    loss_chunk: int = Field(ge=1)


class RevColLMConfig(PreTrainedConfig):
    """A decoder-only language model of reversible columns (`columns`), or a GPT by the midpoint rule (`midpoint`).

    Args:
        vocab_size: number of tokens.
        hidden_size: channels of all states.
        architecture: `columns` are those of RevCol with causal blocks, x_t = F_t(x_(t-1), x_(t-m+1)) + gamma x_(t-m);
            `midpoint` is x_t = F_t(x_(t-1)) + x_(t-2).
        columns, levels, depth: of `columns`, each level of a column has `depth` blocks. The midpoint GPT is a sequence
            of columns x levels x depth blocks.
        num_attention_heads, num_key_value_heads: of every block; fewer of keys and values are shared among queries.
        intermediate_size: channels inside of the feed-forward network; by default 4 x hidden_size, with `silu` 8/3.
        hidden_act: `silu` for SwiGLU, `gelu` for a plain feed-forward network.
        norm_type, norm_eps: `rms` or `layer`, in front of each branch and of the head.
        use_bias: do linear layers have a bias?
        max_position_embeddings: the most tokens of a text.
        rope_theta: base of the rotary positions.
        hidden_dropout, attention_dropout: rates.
        initializer_range: standard deviation of first weights; that of layers that end a branch is divided by the
            square root of twice the number of blocks (Radford et al., 2019).
        net: columns as a YAML file has them (keys of `revnets.ColumnsSpec`), in place of columns, levels, depth and the
            options of the blocks. Only blocks and fusions that are registered, or of this project, are built.
        gain_init: first value of the learned gamma.
        fusion: how a cell joins its reads (`revnets.ColumnsSpec`); by default the state of the level above is projected
            and normalized, and that of the level below is added as it is.
        memory: memory mode of all columns or a list of one per column, or `{"budget": "24GiB"}`. It is no property of
            the weights: `from_pretrained(..., memory="store")` sets another.
        supervised_columns: columns whose last level predicts the next token as well, in training.
        supervision_weight: of their losses.
        loss_chunk: of how many tokens logits are computed at once for the loss.

    Raises:
        revnets.SpecError: a value that no model can be built from; names its key.
    """

    model_type = "revcol_lm"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012  # transformers has it as a list

    vocab_size: int = 256
    hidden_size: int = 256
    architecture: str = "columns"
    columns: int = 4
    levels: int = 4
    depth: int = 1
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    hidden_act: str = "silu"
    norm_type: str = "rms"
    norm_eps: float = 1e-6
    use_bias: bool = False
    max_position_embeddings: int = 1024
    rope_theta: float = 10_000.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    net: dict[str, Any] | None = None
    gain_init: float = 1.0
    fusion: str | dict[str, Any] | None = None
    memory: str | list[str] | dict[str, Any] = "exact"
    supervised_columns: list[int] | tuple[int, ...] = ()
    supervision_weight: float = 0.5
    loss_chunk: int = 1024
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.supervised_columns = list(self.supervised_columns or ())
        self.columns_spec()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration in a `config.json`.

        Raises:
            revnets.SpecError: it holds values that a configuration cannot have.
        """
        try:
            return super().from_dict(config_dict, **kwargs)
        except SpecError:
            raise
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise SpecError(
                "config.json", "", first_line(error), "Use the file of the model", code="wrong-format"
            ) from None

    @classmethod
    def from_yaml(cls, path: str | Path, **options: Any) -> RevColLMConfig:
        """A model whose columns a YAML file describes; a stem and a head in it are left out.

        Args:
            options: all other arguments, such as `vocab_size`.

        Raises:
            revnets.SpecError: something in the file or in the options is wrong.
        """
        layers = read_layers(path)
        for key in ("stem", "head", "taps"):
            layers.data.pop(key, None)
        return cls(net=dump(_checked(layers)), **options)

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of all cells: the most layers that a cache of keys and values has."""
        if self.architecture == "midpoint":
            return self.columns * self.levels * self.depth
        spec = self.columns_spec()
        return spec.columns * sum(level.depth for level in spec.levels)

    def check(self) -> Sizes:
        """The sizes as they are now.

        Raises:
            revnets.SpecError: one cannot be used.
        """
        values = {name: getattr(self, name) for name in Sizes.model_fields}
        sizes = read_layers(values, SOURCE).check(Sizes)
        blocks = sizes.columns * sizes.levels * sizes.depth
        if blocks > MAX_SIZE:
            text = f"{sizes.columns} columns of {sizes.levels} levels with {sizes.depth} blocks are {blocks:,} blocks"
            raise _error("columns", text, f"Give {MAX_SIZE:,} at most", "out-of-range")
        if sizes.hidden_size % (2 * sizes.num_attention_heads):
            text = f"{sizes.hidden_size} channels do not divide into {sizes.num_attention_heads} heads of an even size"
            raise _error("num_attention_heads", text, "Give another number", "not-divisible")
        if sizes.num_attention_heads % (sizes.num_key_value_heads or 1):
            text = f"{sizes.num_attention_heads} heads do not divide among {sizes.num_key_value_heads}"
            raise _error("num_key_value_heads", text, "Give a number that divides", "not-divisible")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < sizes.vocab_size:
            text = f"{self.pad_token_id} is not among {sizes.vocab_size} tokens"
            raise _error("pad_token_id", text, "Give the tokenizer's, or none", "out-of-range")
        if self.net is not None and sizes.architecture == "midpoint":
            text = "the midpoint rule has no columns that a file could describe"
            raise _error("net", text, "Leave it out, or give architecture: columns", "conflicting-values")
        return sizes

    def columns_spec(self) -> ColumnsSpec:
        """The columns that this configuration describes. The midpoint GPT has its blocks as columns of two levels.

        Raises:
            revnets.SpecError: there are no such columns.
        """
        sizes = self.check()
        data = self.net if self.net is not None else self._net()
        if not isinstance(data, dict):
            raise _error("net", f"{type(data).__name__}, where a mapping is needed", "", "wrong-type")
        spec = _checked(read_layers({**data, "memory": self.memory}, SOURCE))
        for index in (0, len(spec.levels) - 1):
            if spec.levels[index].dim != sizes.hidden_size:
                text = f"{spec.levels[index].dim} channels, but the embedding has {sizes.hidden_size}"
                raise _error(f"net.levels.{index}.dim", text, "Give equal numbers", "shape-mismatch")
        width = sizes.hidden_size // sizes.num_attention_heads
        for index, level in enumerate(spec.levels):
            if level.block == "causal_transformer" and level.dim != width * level.options.get("heads", 1):
                text = f"heads of another width than {width}, which is hidden_size / num_attention_heads"
                raise _error(f"net.levels.{index}.heads", text, "All turn by the same angles", "shape-mismatch")
        for column in sizes.supervised_columns:
            if not 0 <= column < spec.columns - 1:
                text = f"column {column}: columns with a loss of their own are 0 to {spec.columns - 2}"
                raise _error("supervised_columns", text, "The last one has the model's", "out-of-range")
        return spec

    def _net(self) -> dict[str, Any]:
        block = {
            "block": "causal_transformer",
            "heads": self.num_attention_heads,
            "kv_heads": self.num_key_value_heads,
            "ffn_dim": self.intermediate_size,
            "activation": self.hidden_act,
            "norm": self.norm_type,
            "norm_eps": self.norm_eps,
            "dropout": self.hidden_dropout,
            "attention_dropout": self.attention_dropout,
            "bias": self.use_bias,
        }
        level = {"dim": self.hidden_size, **block}
        if self.architecture == "midpoint":  # the embedding is the first cell, and every block one more
            cells = self.columns * self.levels * self.depth + 1
            return {"columns": -(-cells // 2), "levels": [{**level, "depth": 1}] * 2, "fusion": "identity"}
        gain = {"init": self.gain_init}
        return {
            "columns": self.columns,
            "levels": [{**level, "depth": self.depth}] * self.levels,
            "fusion": FUSION if self.fusion is None else self.fusion,
            "gain": gain,
        }


def _checked(layers: Layers) -> ColumnsSpec:
    """A specification of columns, which may name code of this project and registered names alone.

    Raises:
        revnets.SpecError: it is wrong, names other code, or has levels of several lengths.
    """
    try:
        spec = layers.check(ColumnsSpec, trust=False)
    except SpecError as error:
        if error.code != "not-trusted":
            raise
        remedy = "Register it with revnets.register_block or register_fusion, import its module, and give that name"
        raise SpecError(error.source, error.key, error.message, remedy, code=error.code) from None
    if set(spec.directions) != {"up"} or spec.constant is not None:
        key = "direction" if spec.constant is None else "constant"
        problem = "the next token is predicted from the top of the last column, which runs up and reads the text alone"
        raise SpecError(layers.name, key, problem, "Remove the key", code="reserved-key")
    if any(reduction != 1 for reduction in spec.reductions()):
        problem = "a level has another length than the text"
        raise SpecError(layers.name, "levels", problem, "Give no stride, and another fusion", code="shape-mismatch")
    return spec


def _error(key: str, text: str, remedy: str, code: str) -> SpecError:
    return SpecError(SOURCE, key, text, remedy, code=code)
