"""The model `revcol_transformer` and its architectures, registered with fairseq."""

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
    """fairseq's transformer with an encoder of reversible columns; the decoder is fairseq's, untouched."""

    @classmethod
    def hub_models(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def add_args(cls, parser: argparse.ArgumentParser) -> None:
        super().add_args(parser)
        add_arguments(parser)

    @classmethod
    def build_model(cls, args: argparse.Namespace, task: Any) -> RevColTransformerModel:
        encoder_spec(vars(args))  # refuses what --model-overrides of fairseq-generate may have set
        model = super().build_model(args, task)
        columns, memory = model.encoder.columns, model.encoder.spec.memory
        if isinstance(memory, BudgetSpec):
            plan_encoder_memory(model, memory, args, task)
        log_encoder_memory(model)
        logger.info(
            "%d reversible columns of %d levels, memory %s; generate, interactive and validate need --user-dir, too",
            columns.graph.columns,
            columns.graph.m,
            memory if isinstance(memory, BudgetSpec) else "/".join(dict.fromkeys(columns.memory)),
        )
        return model

    @classmethod
    def build_encoder(cls, args: Any, src_dict: Any, embed_tokens: Any) -> RevColEncoder:
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
        """As in fairseq, but hidden states are handed out only if asked for: by default it would keep them all."""
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
    """Register an architecture: a function that sets what is not given. A mistake ends the command with one line."""

    def register(defaults: Architecture) -> Architecture:
        @functools.wraps(defaults)
        def complete(args: argparse.Namespace) -> None:
            defaults(args)
            layers = getattr(args, "encoder_layers", None)  # before fairseq sets its own default
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
    """200 M parameters with --share-all-embeddings and 32768 words."""
    _default(args, encoder_embed_dim=768, encoder_ffn_embed_dim=3072, encoder_attention_heads=12)
    _default(args, decoder_attention_heads=12, decoder_layers=6, dropout=0.3)


@architecture("revcol_transformer")
def revcol_transformer(args: argparse.Namespace) -> None:
    revcol_transformer_wmt_en_de(args)


@architecture("revcol_transformer_wmt_en_fr")
def revcol_transformer_wmt_en_fr(args: argparse.Namespace) -> None:
    """209 M parameters with --share-all-embeddings and 44512 words."""
    _default(args, dropout=0.1)
    revcol_transformer_wmt_en_de(args)


@architecture("revcol_transformer_tiny")
def revcol_transformer_tiny(args: argparse.Namespace) -> None:
    """For tests and first steps: 4 columns of 2 levels, 64 channels."""
    _default(args, encoder_embed_dim=64, encoder_ffn_embed_dim=128, encoder_attention_heads=2)
    _default(args, decoder_attention_heads=2, decoder_layers=2)
    if not getattr(args, "revcol_spec", None):
        _default(args, revcol_blocks="1,1")
