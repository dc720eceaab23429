"""RevCol-Transformer encoder: fairseq's embedding followed by reversible columns (RevCol, ICLR 2023)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from fairseq.models.transformer import TransformerEncoderBase
from torch import Tensor, nn

from ..layers.attention import MaskedAttention
from ..layers.transformer import Dropout
from .encoder_spec import encoder_columns, encoder_spec, float32


class RevColEncoder(TransformerEncoderBase):
    """Token and position embedding as the stem, and columns of transformer blocks.

    The output is the top level of the last column. Everything outside of the columns is fairseq's code. States of the
    columns are (B, T, C) in float32, even if the weights are in half precision (--fp16, --bf16).

    Args:
        cfg: fairseq's `TransformerConfig` with the options of `nlp.models.arguments`.
        dictionary: fairseq's dictionary of the source language.
        embed_tokens: Token embedding.

    Raises:
        ArgumentError: If an option is not supported.
        revnets.SpecError: If the columns are invalid.
    """

    def __init__(self, cfg: Any, dictionary: Any, embed_tokens: nn.Embedding):
        without = copy.copy(cfg)
        without.encoder = copy.copy(cfg.encoder)
        without.encoder.layers = 0  # the parent class would build them
        super().__init__(without, dictionary, embed_tokens)
        options = vars(cfg) | {f"encoder_{key}": value for key, value in vars(cfg.encoder).items()}
        self.spec = encoder_spec(options)
        self.columns = encoder_columns(self.spec, embed_tokens.embedding_dim)
        self.columns.stored = options.get("revcol_stored") or 0

    def make_generation_fast_(
        self, name: str, retain_dropout: bool = False, retain_dropout_modules: list[str] | None = None, **_: Any
    ) -> None:
        """Prepare for generation, as fairseq requests; `--retain-dropout` also keeps dropout active in the blocks."""
        if retain_dropout and (retain_dropout_modules is None or type(self).__name__ in retain_dropout_modules):
            for module in self.columns.modules():
                if isinstance(module, (MaskedAttention, Dropout)):
                    module.retain_dropout = True

    # fairseq marks these two methods with `torch.jit.export`, which makes `torch.jit.trace` compile the columns.
    def reorder_encoder_out(self, encoder_out: dict[str, list[Any]], new_order: Tensor) -> dict[str, list[Any]]:
        """Reorder the sentences of the output `encoder_out` for beam search by the indices `new_order`."""
        return super().reorder_encoder_out(encoder_out, new_order)

    def _reorder_encoder_out(self, encoder_out: dict[str, list[Any]], new_order: Tensor) -> dict[str, list[Any]]:
        return super()._reorder_encoder_out(encoder_out, new_order)

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None = None,
        return_all_hiddens: bool = False,
        token_embeddings: Tensor | None = None,
    ) -> dict[str, list[Any]]:
        """Encode sentences.

        Args:
            src_tokens: (B, T) token indices, padded.
            src_lengths: Ignored; padding is recognized by its index.
            return_all_hiddens: Also return the embedding and the top level of every column. They stay in memory as long
                as the caller keeps them.
            token_embeddings: (B, T, C) embeddings to use instead of those of `src_tokens`.

        Returns:
            fairseq's dictionary of lists: `encoder_out` and `encoder_states` (T, B, C), `encoder_padding_mask` (B, T),
            `encoder_embedding` (B, T, C), `src_lengths` (B, 1).
        """
        padding_mask = src_tokens.eq(self.padding_idx)
        stem, embedding = self.forward_embedding(src_tokens, token_embeddings)
        stem = stem.masked_fill(padding_mask[:, :, None], 0)
        taps = range(self.columns.graph.columns) if return_all_hiddens else ()
        found = self.columns(float32(stem), taps=taps, padding_mask=padding_mask if padding_mask.any() else None)
        levels, tapped = found if return_all_hiddens else (found, [])
        x = levels[-1].to(stem.dtype)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return {
            "encoder_out": [_time_first(x)],
            "encoder_padding_mask": [padding_mask],
            "encoder_embedding": [embedding],
            "encoder_states": [_time_first(state) for state in ([stem, *tapped] if return_all_hiddens else [])],
            "fc_results": [],
            "src_tokens": [],
            "src_lengths": [src_tokens.ne(self.padding_idx).sum(1, dtype=torch.int32)[:, None]],
        }


def _time_first(x: Tensor) -> Tensor:
    """Transpose (B, T, C) to (T, B, C), and copy it once instead of in every attention layer of the decoder."""
    return x.transpose(0, 1).contiguous()
