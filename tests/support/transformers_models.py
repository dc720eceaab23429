"""Tiny transformers models of the original classes with prime sizes and dropout, and batches for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from revnets.pretrained.rewired_sequence import rewired_sequences

WORDS, LENGTH, LAYERS = 31, 7, 3


def _bert(library: Any) -> nn.Module:
    config = library.BertConfig(
        hidden_size=26, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=37, vocab_size=WORDS,
        max_position_embeddings=17,
    )  # fmt: skip
    return library.BertForMaskedLM(config)


def _gpt2(library: Any) -> nn.Module:
    config = library.GPT2Config(n_embd=26, n_layer=LAYERS, n_head=2, n_positions=17, **_vocabulary())
    return library.GPT2LMHeadModel(config)


def _llama(library: Any) -> nn.Module:
    return library.LlamaForCausalLM(library.LlamaConfig(attention_dropout=0.1, **_decoder()))


def _gemma2(library: Any) -> nn.Module:
    config = library.Gemma2Config(attention_dropout=0.1, sliding_window=5, **_decoder())
    return library.Gemma2ForCausalLM(config)


def _t5(library: Any) -> nn.Module:
    config = library.T5Config(
        d_model=23, d_kv=5, d_ff=37, num_layers=LAYERS, num_heads=3, decoder_start_token_id=0,
        **_vocabulary() | {"pad_token_id": 0},
    )  # fmt: skip
    return library.T5ForConditionalGeneration(config)


def _bart(library: Any, **options: Any) -> nn.Module:
    config = library.BartConfig(
        d_model=26, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=37, decoder_ffn_dim=41, max_position_embeddings=17, decoder_start_token_id=2,
        forced_eos_token_id=None, **_vocabulary(), **options,
    )  # fmt: skip
    return library.BartForConditionalGeneration(config)


def _mixtral(library: Any) -> nn.Module:
    config = library.MixtralConfig(num_local_experts=3, **_decoder())
    config._experts_implementation = "eager"  # its grouped products require rows of multiples of 16 bytes
    return library.MixtralForCausalLM(config)


def _vocabulary() -> dict[str, int]:
    return {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


def _decoder() -> dict[str, int]:
    return _vocabulary() | {
        "hidden_size": 26, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 10, "intermediate_size": 37, "max_position_embeddings": 17,
    }  # fmt: skip


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "t5": _t5,
    "gemma2": _gemma2,
    "bart": _bart,
    "mixtral": _mixtral,
}
GENERATING = ("gpt2", "llama", "t5", "gemma2", "bart")


def network(family: str, **options: Any) -> Any:
    """Return a network of one of the `FAMILIES` in training mode, with large weights, so that every block matters."""
    import transformers

    torch.manual_seed(11)
    model = FAMILIES[family](transformers, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model.train()


def batch(model: Any, rows: int = 3, length: int = LENGTH) -> dict[str, Tensor]:
    """Return tokens (rows, length) and labels. The first row is padded on the left, the second one on the right."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(4, WORDS, (rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, :2] = mask[1, -3:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def set_memory(model: nn.Module, memory: str) -> None:
    """Set the memory mode of all rewired sequences of a network."""
    for sequence in rewired_sequences(model):
        sequence.memory = memory


def train_step(model: Any, memory: str, **arguments: Any) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Run forward and backward on a copy; return logits, hidden states and gradients by name.

    Hidden states are part of the loss, so that gradients also enter between the blocks.
    """
    model = copy.deepcopy(model)
    set_memory(model, memory)
    torch.manual_seed(7)
    output = model(**batch(model), output_hidden_states=True, use_cache=False, **arguments)
    hidden = [
        state
        for key in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
        for state in output.get(key) or ()
    ]
    (output.loss + sum(state.square().mean() for state in hidden)).backward()
    return [output.logits, *hidden], {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_bits(one: Any, other: Any) -> None:
    """Assert that two results of `train_step` are equal bit for bit."""
    (tensors, gradients), (expected, expected_gradients) = one, other
    assert len(tensors) == len(expected)
    assert all(torch.equal(tensor, reference) for tensor, reference in zip(tensors, expected, strict=True))
    assert gradients.keys() == expected_gradients.keys()
    for name, reference in expected_gradients.items():
        found = gradients[name]
        assert (found is reference is None) or torch.equal(found, reference), f"the gradient of {name} differs"
