"""RevCol-Transformer as a module: sizes, padding, gradients, precision, saved bytes and outputs."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor

pytest.importorskip("fairseq", reason="fairseq is not installed (extra nlp)")

from fairseq import utils

from nlp.layers.transformer import ACTIVATIONS, Dropout
from revnets.memory.tracker import kept_bytes
from tests.support.fairseq import build, options, sample


def gradients(
    model: torch.nn.Module, memory: str, inputs: dict[str, Tensor], autocast: torch.dtype | None = None
) -> list[Tensor]:
    """Gradients of all parameters through the model's forward, with the same random numbers."""
    model.encoder.columns.memory = memory
    torch.manual_seed(3)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logits, _ = model(**inputs)
    return list(torch.autograd.grad(logits.float().square().mean(), list(model.parameters())))


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("arch", "words", "least", "most"),
    [("revcol_transformer", 32768, 200.0e6, 201.0e6), ("revcol_transformer_wmt_en_fr", 44512, 209.0e6, 210.0e6)],
)
@pytest.mark.parametrize("attention", ["standard", "cosine"])
def test_parameters_are_those_of_the_paper(arch, words, least, most, attention):
    with torch.device("meta"):
        model = build(arch, words, revcol_attention=attention)
    assert least <= sum(parameter.numel() for parameter in model.parameters()) <= most
    assert len([module for module in model.encoder.columns.modules() if type(module).__name__ == "Project"]) == 9


def test_architectures_differ_as_documented():
    default, de, fr = (options(f"revcol_transformer{name}") for name in ("", "_wmt_en_de", "_wmt_en_fr"))
    assert vars(default) | {"arch": ""} == vars(de) | {"arch": ""}
    differ = {key for key, value in vars(fr).items() if vars(de)[key] != value}
    assert (differ, de.dropout, fr.dropout) == ({"arch", "dropout"}, 0.3, 0.1)


@pytest.mark.parametrize("name", utils.get_available_activation_fns())
def test_activations_are_those_of_fairseq(name):
    x = torch.randn(1009, dtype=torch.float64)
    ours = build(activation_fn=name).encoder.columns.cells[0][0].function.blocks[0].activation
    assert ours is ACTIVATIONS[name]
    theirs = utils.get_activation_fn(name)(x)
    torch.testing.assert_close(ours(x), theirs, rtol=1e-5, atol=1e-6)  # fairseq computes some activations in float32


def test_decoder_is_that_of_fairseq():
    from fairseq.models.transformer import TransformerDecoderBase

    model = build()
    assert issubclass(type(model.decoder), TransformerDecoderBase)
    assert type(model.decoder).__module__.startswith("fairseq.")
    assert model.decoder.embed_tokens is model.encoder.embed_tokens


def test_columns_are_checked_once_and_made_once(monkeypatch):
    built = []
    for name in ("encoder", "encoder_spec"):
        module = importlib.import_module(f"nlp.models.{name}")
        original = module.encoder_columns

        def counting(*given, name=name, original=original):
            built.append(name)
            return original(*given)

        monkeypatch.setattr(module, "encoder_columns", counting)
    build(revcol_gain=0.4321)
    assert built == ["encoder_spec", "encoder"]


# ----------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("attention", ["standard", "cosine"])
@pytest.mark.parametrize("norm", ["post", "pre", "res-post"])
def test_a_sentence_does_not_depend_on_padding_or_other_sentences(attention, norm):
    encoder = build(revcol_attention=attention, revcol_norm=norm).double().eval().encoder
    tokens = sample((11, 7, 3))["src_tokens"]
    together = encoder(tokens)["encoder_out"][0]
    for row, length in enumerate((11, 7, 3)):
        alone = encoder(tokens[row : row + 1, -length:])["encoder_out"][0]
        torch.testing.assert_close(together[-length:, row], alone[:, 0], rtol=1e-10, atol=1e-12)


def test_values_at_padding_have_no_effect():
    encoder = build().double().eval().encoder
    tokens = sample((11, 7))["src_tokens"]
    embeddings = encoder.embed_tokens(tokens).detach().requires_grad_()
    out = encoder(tokens, token_embeddings=embeddings)["encoder_out"][0]
    out[-7:, 1].square().sum().backward()
    assert embeddings.grad[0].eq(0).all()
    assert embeddings.grad[1, :4].eq(0).all()
    assert embeddings.grad[1, 4:].ne(0).all()


def test_a_row_of_padding_has_no_effect():
    encoder = build().encoder
    tokens = sample((11, 7))["src_tokens"]
    tokens[1] = encoder.padding_idx
    encoder(tokens)["encoder_out"][0].square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


def test_reordering_for_beam_search_follows_the_sentences():
    encoder = build().eval().encoder
    found = encoder(sample()["src_tokens"], return_all_hiddens=True)
    order = torch.tensor([2, 0, 0, 1])
    states = [state.clone() for state in found["encoder_states"]]
    again = encoder.reorder_encoder_out(found, order)
    assert torch.equal(again["encoder_out"][0], found["encoder_out"][0][:, order])
    assert torch.equal(again["encoder_padding_mask"][0], found["encoder_padding_mask"][0][order])
    assert_equal(again["encoder_states"], [state[:, order] for state in states])


def test_incremental_decoding_equals_full_decoding():
    model = build().eval()
    inputs = sample((11, 7))
    words = inputs["prev_output_tokens"][:, :6]
    memory = model.encoder.forward_torchscript(inputs)
    full, _ = model.decoder(words, encoder_out=memory)
    steps: dict = {}
    for position in range(6):
        one, _ = model.decoder(words[:, : position + 1], encoder_out=memory, incremental_state=steps)
        torch.testing.assert_close(one[:, 0], full[:, position], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.99])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate):
    drop, x = Dropout(rate), torch.randn(101, 103, 11, dtype=torch.float64).requires_grad_()
    y = drop(x)
    kept = y != 0
    expected = (1 - rate) * x.numel()
    assert abs(int(kept.sum()) - expected) < 5 * (expected * rate) ** 0.5  # five standard deviations
    torch.testing.assert_close(y[kept], x[kept] / (1 - rate), rtol=2e-3, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient != 0, kept)
    near = (kept[..., 1:] == kept[..., :-1]).double().mean()  # neighbors are independent
    assert abs(float(near) - (rate**2 + (1 - rate) ** 2)) < 0.01
    assert torch.equal(drop.eval()(x), x)


def test_dropout_can_be_retained_for_generation():
    model, inputs = build(attention_dropout=0.3), sample()
    plain, retained = model.eval(), copy.deepcopy(model)
    plain.make_generation_fast_(retain_dropout=False)
    retained.make_generation_fast_(retain_dropout=True, retain_dropout_modules=["RevColEncoder"])
    for each, differ in ((plain, False), (retained, True)):
        one, other = (each.encoder(inputs["src_tokens"])["encoder_out"][0] for _ in range(2))
        assert torch.equal(one, other) != differ
    blocks = [module for module in retained.encoder.columns.modules() if hasattr(module, "retain_dropout")]
    assert len(blocks) == 8 * 3
    assert all(block.retain_dropout for block in blocks)


# ------------------------------------------------------------------------------------------- gradients and saved bytes


@pytest.mark.parametrize("attention", ["standard", "cosine"])
@pytest.mark.parametrize("lengths", [(11, 7, 3), (5, 5)])
def test_exact_gives_the_gradients_of_store_with_dropout(attention, lengths):
    model = build(
        revcol_attention=attention, dropout=0.3, attention_dropout=0.2, activation_dropout=0.1, revcol_columns=5
    )
    inputs = sample(lengths)
    stored = gradients(model, "store", inputs)
    assert_equal(gradients(model, "exact", inputs), stored)
    assert_equal(gradients(model, "recompute", inputs), stored)
    assert all(gradient.ne(0).any() for gradient in stored)


def test_decoder_layers_may_be_checkpointed():
    models = [build(checkpoint_activations=checkpoint).double() for checkpoint in (False, True)]
    inputs = sample()
    for model in models:
        torch.manual_seed(3)
        logits, _ = model(**inputs)
        logits.square().mean().backward()
    plain, checkpointed = ({name: value.grad for name, value in model.named_parameters()} for model in models)
    torch.testing.assert_close(checkpointed, plain, rtol=1e-10, atol=1e-14)


def test_a_column_saves_at_most_a_tenth_of_store():
    inputs = sample((29, 23, 31, 31))

    def grows(memory: str) -> float:
        """Bytes saved per additional column, through the model's forward."""
        few, many = (
            kept_bytes(build(revcol_columns=columns, revcol_memory=memory, dropout=0.1), **inputs) for columns in (4, 8)
        )
        return (many - few) / 4

    assert grows("exact") <= 0.1 * grows("store")


def test_hidden_states_are_returned_only_on_request():
    model = build(revcol_columns=3).eval()
    inputs = sample()
    found = model.encoder.forward_torchscript(inputs)
    assert found["encoder_states"] == []
    states = model.encoder(inputs["src_tokens"], return_all_hiddens=True)["encoder_states"]
    assert len(states) == 1 + 3  # the embedding and the top level of every column
    assert torch.equal(states[-1], found["encoder_out"][0])
    seen = []
    model.encoder.register_forward_hook(lambda *call: seen.append(call[-1]["encoder_states"]))
    model(**inputs)
    model(**inputs, return_all_hiddens=True)
    assert [len(states) for states in seen] == [0, 4]


# --------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["standard", "cosine"])
@pytest.mark.parametrize("way", ["weights", "autocast"])  # --bf16 and --fp16; --amp
def test_states_are_float32_in_any_precision(dtype, way, attention):
    model = build(revcol_columns=3, revcol_attention=attention)
    if way == "weights":
        model.to(dtype)
    dtypes = []
    for cell in model.encoder.columns.flat():
        cell.register_forward_hook(lambda *call: dtypes.append(call[-1].dtype))
    inputs, autocast = sample(), dtype if way == "autocast" else None
    stored = gradients(model, "store", inputs, autocast)
    assert_equal(gradients(model, "exact", inputs, autocast), stored)
    with torch.autocast("cpu", dtype, enabled=way == "autocast"):
        memory = model.encoder(inputs["src_tokens"])["encoder_out"][0]
    assert memory.dtype == (dtype if way == "weights" else torch.float32)  # dtype of the decoder's weights
    assert set(dtypes) == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in stored)
