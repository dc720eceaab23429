"""fairseq model `revcol_transformer` and its architectures."""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

try:
    from fairseq.models import register_model, register_model_architecture
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the translation model needs fairseq: pip install 'revnets[nlp]' (Linux x86_64, Python 3.11 or 3.12)"
    ) from error
from fairseq.models.transformer import TransformerConfig, TransformerModel, base_architecture

from revnets.config.memory_budget import BudgetSpec

from .arguments import add_arguments, settle
from .checkpoint_globals import allow_fairseq_checkpoints, check_fairseq_checkpoints
from .encoder import RevColEncoder
from .encoder_spec import encoder_spec
from .memory_budget import log_encoder_memory, plan_encoder_memory

logger = logging.getLogger(__name__)

allow_fairseq_checkpoints()
check_fairseq_checkpoints()


@register_model("revcol_transformer")
class RevColTransformerModel(TransformerModel):
    """fairseq's transformer with an encoder of reversible columns. The decoder is unchanged."""

    @classmethod
    def hub_models(cls) -> dict[str, Any]:
        """Return no models, because none are released."""
        return {}

    @classmethod
    def add_args(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options of fairseq's transformer and `--revcol-*`."""
        super().add_args(parser)
        add_arguments(parser)

    @classmethod
    def build_model(cls, args: argparse.Namespace, task: Any) -> RevColTransformerModel:
        """Build the model, plan its memory if there is a budget, and log its columns.

        Args:
            args: All options.
            task: fairseq's task.

        Raises:
            ArgumentError: If an option is not supported.
            revnets.SpecError: If the columns are invalid.
        """
        encoder_spec(vars(args))  # refuses unsupported values of fairseq-generate --model-overrides
        model = super().build_model(args, task)
        columns, memory = model.encoder.columns, model.encoder.spec.memory
        if isinstance(memory, BudgetSpec):
            plan_encoder_memory(model, memory, args, task)
        log_encoder_memory(model)
        logger.info(
            "%d reversible columns of %d levels, memory %s; generate, interactive and validate also need --user-dir",
            columns.graph.columns,
            columns.graph.m,
            memory if isinstance(memory, BudgetSpec) else "/".join(dict.fromkeys(columns.memory)),
        )
        return model

    @classmethod
    def build_encoder(cls, args: Any, src_dict: Any, embed_tokens: Any) -> RevColEncoder:
        """Build the encoder."""
        return RevColEncoder(TransformerConfig.from_namespace(args), src_dict, embed_tokens)

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor,
        prev_output_tokens: Tensor,
        return_all_hiddens: bool = False,
        features_only: bool = False,
        alignment_layer: int | None = None,
        alignment_heads: int | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Compute the decoder's output as fairseq does, but return hidden states only on request.

        fairseq's default is to return all of them, which would keep them in memory.

        Args:
            src_tokens: (B, T) source tokens.
            src_lengths: (B,) lengths of the source sentences.
            prev_output_tokens: (B, T) input tokens of the decoder.
            return_all_hiddens: Return the hidden states of the encoder.
            features_only: Return features instead of logits.
            alignment_layer: Decoder layer of the alignment.
            alignment_heads: Number of heads of the alignment.

        Returns:
            Logits or features of the decoder, and its dictionary of further outputs.
        """
        return super().forward(
            src_tokens,
            src_lengths,
            prev_output_tokens,
            return_all_hiddens,
            features_only,
            alignment_layer,
            alignment_heads,
        )


Architecture = Callable[[argparse.Namespace], None]


def architecture(name: str) -> Callable[[Architecture], Architecture]:
    """Register an architecture, a function that sets unset options. Invalid options end the command with one line.

    Args:
        name: Name for `--arch`.
    """

    def register(defaults: Architecture) -> Architecture:
        @functools.wraps(defaults)
        def complete(args: argparse.Namespace) -> None:
            defaults(args)
            layers = getattr(args, "encoder_layers", None)  # before fairseq sets its default
            base_architecture(args)
            try:
                settle(args, layers)
            except ValueError as error:
                raise SystemExit(f"--arch {name}: {error}") from None

        register_model_architecture("revcol_transformer", name)(complete)
        return defaults

    return register


def _default(args: argparse.Namespace, **values: Any) -> None:
    for key, value in values.items():
        setattr(args, key, getattr(args, key, value))


@architecture("revcol_transformer_wmt_en_de")
def revcol_transformer_wmt_en_de(args: argparse.Namespace) -> None:
    """Set the sizes for WMT English-German: 200 M parameters with --share-all-embeddings and 32768 types."""
    _default(args, encoder_embed_dim=768, encoder_ffn_embed_dim=3072, encoder_attention_heads=12)
    _default(args, decoder_attention_heads=12, decoder_layers=6, dropout=0.3)


@architecture("revcol_transformer")
def revcol_transformer(args: argparse.Namespace) -> None:
    """Set the sizes of `revcol_transformer_wmt_en_de`."""
    revcol_transformer_wmt_en_de(args)


@architecture("revcol_transformer_wmt_en_fr")
def revcol_transformer_wmt_en_fr(args: argparse.Namespace) -> None:
    """Set the sizes for WMT English-French: 209 M parameters with --share-all-embeddings and 44512 types."""
    _default(args, dropout=0.1)
    revcol_transformer_wmt_en_de(args)


@architecture("revcol_transformer_tiny")
def revcol_transformer_tiny(args: argparse.Namespace) -> None:
    """Set small sizes for tests and first experiments: 4 columns of 2 levels, 64 channels."""
    _default(args, encoder_embed_dim=64, encoder_ffn_embed_dim=128, encoder_attention_heads=2)
    _default(args, decoder_attention_heads=2, decoder_layers=2)
    if not getattr(args, "revcol_spec", None):
        _default(args, revcol_blocks="1,1")
