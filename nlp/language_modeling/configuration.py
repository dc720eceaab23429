"""Configuration of a language model, with Hugging Face's names, and the columns that it describes."""

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

from .architectures import SOURCE  # registers the blocks

MAX_WIDTH, MAX_WORDS, MAX_POSITIONS = 2**17, 2**24, 2**24
"""Bounds of channels, vocabulary and length; larger values are considered typing errors."""


FUSION = {"type": "linear", "project": ["above"]}
"""Default fusion."""


class Sizes(Strict):
    """Checked values of a `RevColLMConfig`, before anything is built from it."""

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
    """Configuration of a decoder-only language model of reversible columns, or of a GPT by the midpoint rule.

    Args:
        vocab_size: Size of the vocabulary.
        hidden_size: Channels of all states.
        architecture: `columns` for RevCol with causal blocks, x_t = F_t(x_(t-1), x_(t-m+1)) + gamma x_(t-m);
            `midpoint` for x_t = F_t(x_(t-1)) + x_(t-2).
        columns: Number of columns.
        levels: Number of levels of a column.
        depth: Number of blocks of a level. The midpoint GPT is a sequence of columns x levels x depth blocks.
        num_attention_heads: Number of query heads of every block.
        num_key_value_heads: Number of key and value heads. By default `num_attention_heads`.
        intermediate_size: Hidden channels of the feed-forward network. By default 4 x hidden_size, or 8/3 x
            hidden_size with `silu`.
        hidden_act: `silu` for SwiGLU, `gelu` for a plain feed-forward network.
        norm_type: `rms` for RMSNorm, `layer` for LayerNorm, before each branch and the head.
        norm_eps: Epsilon of the norms.
        use_bias: Whether linear layers have a bias.
        max_position_embeddings: Maximum number of tokens of a sequence.
        rope_theta: Base of the rotary position embeddings.
        hidden_dropout: Dropout rate of the branches.
        attention_dropout: Dropout rate of the attention weights.
        initializer_range: Standard deviation of initial weights. For the last layer of a branch, it is divided by the
            square root of twice the number of blocks (Radford et al., 2019).
        net: Columns as in a YAML file (keys of `revnets.ColumnsSpec`), instead of columns, levels, depth and the
            options of the blocks. Only registered components and those of this project are built.
        gain_init: Initial value of the learned gamma.
        fusion: Fusion of the inputs of a cell (see `revnets.ColumnsSpec`). By default, the state of the level above is
            projected and normalized, and that of the level below is added unchanged.
        memory: Memory mode of all columns, a list with one mode per column, or `{"budget": "24GiB"}`. It does not
            affect the weights: `from_pretrained(..., memory="store")` sets another mode.
        supervised_columns: Columns whose last level also predicts the next token in training.
        supervision_weight: Weight of their losses.
        loss_chunk: Number of tokens whose logits are computed at a time for the loss.
        tie_word_embeddings: Whether embedding and head share their weights.
        use_cache: Whether `forward` makes a cache of keys and values by default.
        pad_token_id: Index of the padding token.
        bos_token_id: Index of the first token of a text.
        eos_token_id: Index of the last token of a text.

    Raises:
        revnets.SpecError: If no model can be built from a value; names its key.
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
        """Create a configuration from the content of a `config.json`.

        Raises:
            revnets.SpecError: If a value is invalid.
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
        """Create a configuration whose columns a YAML file describes; its stem and head are ignored.

        Args:
            path: YAML file.
            options: All other arguments, such as `vocab_size`.

        Raises:
            revnets.SpecError: If the file or an option is invalid.
        """
        layers = read_layers(path)
        for key in ("stem", "head", "taps"):
            layers.data.pop(key, None)
        return cls(net=dump(_checked(layers)), **options)

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks in all cells, the maximum number of layers of a cache of keys and values."""
        if self.architecture == "midpoint":
            return self.columns * self.levels * self.depth
        spec = self.columns_spec()
        return spec.columns * sum(level.depth for level in spec.levels)

    def check(self) -> Sizes:
        """Check the current values.

        Raises:
            revnets.SpecError: If a value is invalid.
        """
        values = {name: getattr(self, name) for name in Sizes.model_fields}
        sizes = read_layers(values, SOURCE).check(Sizes)
        blocks = sizes.columns * sizes.levels * sizes.depth
        if blocks > MAX_SIZE:
            text = f"{sizes.columns} columns of {sizes.levels} levels with {sizes.depth} blocks are {blocks:,} blocks"
            raise _error("columns", text, f"Use at most {MAX_SIZE:,}", "out-of-range")
        if sizes.hidden_size % (2 * sizes.num_attention_heads):
            text = f"{sizes.hidden_size} channels cannot be divided into {sizes.num_attention_heads} heads of even size"
            raise _error("num_attention_heads", text, "Use another number", "not-divisible")
        if sizes.num_attention_heads % (sizes.num_key_value_heads or 1):
            text = f"{sizes.num_attention_heads} query heads cannot share {sizes.num_key_value_heads} equally"
            raise _error("num_key_value_heads", text, "Use a divisor of the query heads", "not-divisible")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < sizes.vocab_size:
            text = f"{self.pad_token_id} is outside of the vocabulary of {sizes.vocab_size} tokens"
            raise _error("pad_token_id", text, "Use that of the tokenizer, or None", "out-of-range")
        if self.net is not None and sizes.architecture == "midpoint":
            text = "the midpoint rule does not use columns of a file"
            raise _error("net", text, "Remove it, or set architecture: columns", "conflicting-values")
        return sizes

    def columns_spec(self) -> ColumnsSpec:
        """Create the specification of the columns. For the midpoint GPT, columns of two levels contain its blocks.

        Raises:
            revnets.SpecError: If the columns are invalid.
        """
        sizes = self.check()
        data = self.net if self.net is not None else self._net()
        if not isinstance(data, dict):
            raise _error(
                "net", f"expected a mapping, not {type(data).__name__}", "Use the keys of a YAML file", "wrong-type"
            )
        spec = _checked(read_layers({**data, "memory": self.memory}, SOURCE))
        for index in (0, len(spec.levels) - 1):
            if spec.levels[index].dim != sizes.hidden_size:
                text = f"{spec.levels[index].dim} channels, but the embedding has {sizes.hidden_size}"
                raise _error(f"net.levels.{index}.dim", text, "Use equal numbers", "shape-mismatch")
        width = sizes.hidden_size // sizes.num_attention_heads
        for index, level in enumerate(spec.levels):
            if level.block == "causal_transformer" and level.dim != width * level.options.get("heads", 1):
                text = f"channels per head differ from {width}, which is hidden_size / num_attention_heads"
                raise _error(f"net.levels.{index}.heads", text, f"Use heads of {width} channels", "shape-mismatch")
        for column in sizes.supervised_columns:
            if not 0 <= column < spec.columns - 1:
                text = f"column {column} cannot be supervised separately; columns 0 to {spec.columns - 2} can"
                raise _error("supervised_columns", text, "The last column has the loss of the model", "out-of-range")
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
        if self.architecture == "midpoint":  # the embedding is the first cell, followed by one per block
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
    """Check columns, which may name only registered components and those of this project.

    Raises:
        revnets.SpecError: If they are invalid, name other code, or have levels of different lengths.
    """
    try:
        spec = layers.check(ColumnsSpec, trust=False)
    except SpecError as error:
        if error.code != "not-trusted":
            raise
        remedy = "Register it with revnets.register_block or register_fusion, import its module, and use that name"
        raise SpecError(error.source, error.key, error.message, remedy, code=error.code) from None
    if set(spec.directions) != {"up"} or spec.constant is not None:
        key = "direction" if spec.constant is None else "constant"
        problem = "a language model needs columns that run up and read only the text"
        raise SpecError(layers.name, key, problem, "Remove the key", code="reserved-key")
    if any(reduction != 1 for reduction in spec.reductions()):
        problem = "a level changes the number of positions"
        raise SpecError(
            layers.name, "levels", problem, "Remove its stride, or use another fusion", code="shape-mismatch"
        )
    return spec


def _error(key: str, text: str, remedy: str, code: str) -> SpecError:
    return SpecError(SOURCE, key, text, remedy, code=code)
