"""Language model for transformers: `RevColForCausalLM`, registered with `AutoModelForCausalLM`.

Shapes: B sequences, T tokens of this call, S tokens including those in a cache, C channels, V types.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from revnets import Gain, Memory
from revnets.config.errors import ArgumentError
from revnets.config.memory_budget import BudgetSpec
from revnets.memory.auto_budget import keep_budget
from revnets.models.saved_folder import require_all, require_config, require_room

from .architectures import midpoint, revcol
from .causal_attention import BranchEnd
from .causal_blocks import NORMS
from .configuration import RevColLMConfig
from .loss import IGNORED, chunked_loss, shifted
from .rotary import rotation


class PreTrainedLanguageModel(PreTrainedModel):
    """Base class of both models: loading, initialization and attributes that transformers reads."""

    config_class = RevColLMConfig
    config: RevColLMConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["Cell"]  # noqa: RUF012  # transformers has it as a list

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a model with safetensors weights; the arguments are those of transformers.

        Raises:
            revnets.SpecError: If the weights in the directory do not match its configuration.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        folder = Path(pretrained_model_name_or_path or "") / (kwargs.get("subfolder") or "")
        kwargs.setdefault("use_safetensors", True)
        require_config(folder)
        if pretrained_model_name_or_path and (folder / "config.json").exists():
            given = kwargs.get("config")
            config = given if isinstance(given, PreTrainedConfig) else RevColLMConfig.from_pretrained(folder)
            blocks = {"columns": config.num_hidden_layers}
            require_room(folder, lambda: cls(config), blocks, "hidden_size")
        found: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        if wants_info:
            return found
        model, info = found
        require_all(str(pretrained_model_name_or_path), info)
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Gain):
            initialization.constant_(module.weight, module.init)
            return
        super()._init_weights(module)
        if isinstance(module, BranchEnd):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            initialization.normal_(module.weight, mean=0.0, std=std)


class RevColLMModel(PreTrainedLanguageModel):
    """Embedding, reversible columns of causal blocks and a final norm. Maps tokens (B, T) to states (B, T, C).

    Args:
        config: Configuration of the model.
    """

    def __init__(self, config: RevColLMConfig):
        super().__init__(config)
        spec = config.columns_spec()
        # no padding_idx: the token may also mark the end of a text, whose embedding is trained
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        is_midpoint = config.architecture == "midpoint"
        self.columns = midpoint(spec, config.num_hidden_layers) if is_midpoint else revcol(spec)
        layers = (module for module in self.columns.modules() if hasattr(module, "layer_idx"))
        for index, layer in enumerate(layers):
            layer.layer_idx = index  # type: ignore[assignment]  # a plain attribute
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.norm = NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps)
        self.supervised_norms = nn.ModuleList(
            NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps) for _ in config.supervised_columns
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        supervised: bool = False,
        past_key_values: Cache | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the states of the last column.

        Args:
            input_ids: (B, T) tokens.
            attention_mask: (B, S), 0 at padding; or (B, 1, T, S) as in `CausalAttention.forward`.
            position_ids: (B, T) positions. By default the number of earlier tokens without padding.
            cache: Keys and values of earlier tokens, to which those of this call are appended.
            inputs_embeds: (B, T, C) embeddings, instead of `input_ids`.
            use_cache: Create a cache if none is given. By default as in the configuration, but never while gradients
                are recorded.
            supervised: Return `hidden_states`, the normalized states of the supervised columns.
            past_key_values: Former name of `cache` in transformers.
            others: Ignored, except for requests of outputs that columns do not keep.

        Returns:
            `last_hidden_state` (B, T, C), `cache` and `hidden_states`.

        Raises:
            ArgumentError: If there is not exactly one input, a token is outside of the vocabulary, there are more
                tokens than positions, an output is not available, or a cache is used while gradients are recorded,
                because a replay would fill it twice.
        """
        for key in ("output_attentions", "output_hidden_states"):
            if others.get(key):
                raise ArgumentError(
                    f"{key}: reversible columns do not keep these outputs. Remove the argument",
                    key,
                    code="reserved-key",
                )
        x = self._embedded(input_ids, inputs_embeds)
        cache = past_key_values if cache is None else cache
        if torch.is_grad_enabled() and any(mode is not Memory.STORE for mode in self.columns.memory):
            if cache is not None or use_cache:
                problem = "while gradients are recorded, a cache of keys and values needs memory mode store"
                remedy = "Call the model under torch.no_grad(), or without a cache"
                raise ArgumentError(f"{problem}. {remedy}", "cache", code="conflicting-values")
        elif cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        past = 0 if cache is None else int(cache.get_seq_length())
        if past + x.shape[1] > self.config.max_position_embeddings:
            problem = f"{past + x.shape[1]} tokens exceed max_position_embeddings, "
            problem += f"{self.config.max_position_embeddings}. Shorten the text"
            raise ArgumentError(problem, "input_ids", code="too-large")
        if position_ids is None:
            position_ids = _positions(attention_mask, past, x)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, cache=cache, position_ids=position_ids
        )
        context = {
            "rotation": rotation(position_ids, self.head_dim, self.config.rope_theta, x.dtype),
            "mask": mask,
            "cache": cache,
        }
        if supervised and self.supervised_norms:
            levels, tapped = self.columns(x, taps=tuple(self.config.supervised_columns), **context)
            states = tuple(norm(state) for norm, state in zip(self.supervised_norms, tapped, strict=True))
        else:
            levels, states = self.columns(x, **context), None
        return BaseModelOutputWithPast(last_hidden_state=self.norm(levels[-1]), cache=cache, hidden_states=states)

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ArgumentError("expected either input_ids or inputs_embeds", "input_ids", code="conflicting-values")
        if inputs_embeds is not None:
            return inputs_embeds
        assert input_ids is not None
        try:
            return self.embed_tokens(input_ids)
        except IndexError:  # on CPUs; GPUs report it later in another way
            problem = f"a token is outside of the vocabulary of {self.config.vocab_size}"
            raise ArgumentError(f"{problem}. Use the tokenizer of this model", "input_ids", "out-of-range") from None


class RevColForCausalLM(PreTrainedLanguageModel, GenerationMixin):
    """Language model with a head. Maps tokens (B, T) to logits (B, T, V), or to the loss of the next token.

    `model.model.columns` are the reversible columns, with `memory`, `stored` and the other attributes of
    `revnets.ReversibleColumns`.

    Args:
        config: Configuration of the model.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  # as transformers has it

    def __init__(self, config: RevColLMConfig):
        super().__init__(config)
        self.model = RevColLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        budget = self.model.columns.budget
        if isinstance(budget, BudgetSpec):
            keep_budget(self, budget)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits of the next token, and the loss if there are labels.

        Args:
            input_ids: See `RevColLMModel.forward`.
            attention_mask: See `RevColLMModel.forward`.
            position_ids: See `RevColLMModel.forward`.
            cache: See `RevColLMModel.forward`.
            inputs_embeds: See `RevColLMModel.forward`.
            labels: (B, T) tokens, which this method shifts. -100 excludes a token from the loss.
            use_cache: See `RevColLMModel.forward`.
            logits_to_keep: Number of last positions, or indices of positions, whose logits are returned; 0 for all.
            skip_logits: Return no logits. Then the logits of a whole batch are never in memory, because the loss is
                computed in chunks of `loss_chunk` tokens. By default True in training with labels.
            num_items_in_batch: Divisor of the summed loss. By default the number of tokens with a loss.
            past_key_values: Former name of `cache` in transformers.
            kwargs: Further arguments of `RevColLMModel.forward`.

        Returns:
            `loss`, `logits` and `cache`. In training, the loss includes the weighted losses of supervised columns.

        Raises:
            ArgumentError: See `RevColLMModel.forward`.
        """
        supervised = labels is not None and self.training
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            use_cache,
            supervised,
            past_key_values,
            **kwargs,
        )
        hidden, loss = outputs.last_hidden_state, None
        if labels is not None:
            targets = shifted(labels).flatten()
            count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            loss = self._summed_loss(hidden, targets) / count
            for states in outputs.hidden_states or ():
                loss = loss + self.config.supervision_weight * self._summed_loss(states, targets) / count
        logits = None
        if not (labels is not None and self.training if skip_logits is None else skip_logits):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=outputs.cache)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate tokens; the arguments are those of transformers. Memory modes have no effect.

        Raises:
            ArgumentError: If a memory mode is given, or see `RevColLMModel.forward`.
        """
        if "memory" in kwargs:
            problem = "generation saves nothing for backward, so it has no memory mode. Remove the argument"
            raise ArgumentError(problem, "memory", code="reserved-key")
        inherited: Any = super()
        return inherited.generate(*args, **kwargs)

    def _summed_loss(self, states: Tensor, targets: Tensor) -> Tensor:
        return chunked_loss(states.flatten(0, 1), self.lm_head, targets, self.config.loss_chunk)


def _positions(attention_mask: Tensor | None, past: int, x: Tensor) -> Tensor:
    """Return the positions (B or 1, T) of the tokens of this call, without padding on the left."""
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -x.shape[1] :]
    return torch.arange(past, past + x.shape[1], device=x.device)[None]


AutoConfig.register(RevColLMConfig.model_type, RevColLMConfig)
AutoModel.register(RevColLMConfig, RevColLMModel)
AutoModelForCausalLM.register(RevColLMConfig, RevColForCausalLM)
