"""Make small networks of timm and transformers with random weights reversible, and measure the memory saved.

    pip install 'revnets[vision,hf]'
    python examples/pretrained/architectures.py                                # under a CPU minute, one thread
    python examples/pretrained/architectures.py --only GPT-2,Swin

For each network, prints the number of converted blocks, the memory that one training step saves for backward before and
after the conversion, whether the gradients of `exact` equal those of `store` bit for bit, and whether `undo_reversible`
restores the same outputs. Networks that are refused are listed with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import torch
import typer
from _measures import all_equal, megabytes, new_console, new_table, run_as_script, steps
from torch import Tensor, nn

import revnets
from revnets.engine.errors import ArgumentError
from revnets.memory.tracker import MemoryTracker
from revnets.pretrained.rewired_sequence import rewired_sequences


class Tried(NamedTuple):
    """A network before and after it is made reversible."""

    blocks: int
    plain: int  # bytes saved for backward
    exact: int
    equal: bool  # gradients of `exact` and `store`
    undone: bool  # outputs after undo_reversible equal the original ones


def of_timm(name: str, **options: Any) -> Callable[[], tuple[nn.Module, dict[str, Tensor]]]:
    """Return a factory of a timm model and a batch of images."""

    def create() -> tuple[nn.Module, dict[str, Tensor]]:
        import timm

        model = timm.create_model(name, num_classes=7, **options)
        return model, {"x": torch.randn(5, 3, 64, 64)}

    return create


def of_transformers(kind: str, head: str, **options: Any) -> Callable[[], tuple[nn.Module, dict[str, Tensor]]]:
    """Return a factory of a transformers model, given its configuration type, and a batch of tokens or images."""

    def create() -> tuple[nn.Module, dict[str, Tensor]]:
        import transformers

        sizes = {"num_hidden_layers": 6, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
        names = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = transformers.AutoConfig.for_model(kind, **{**sizes, **names, **options})
        config.use_cache = False
        model = getattr(transformers, head).from_config(config)
        tokens = torch.randint(3, 97, (5, 23))
        if "image_size" in options:
            return model, {"pixel_values": torch.randn(5, 3, 64, 64)}
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        return model, {**batch, "decoder_input_ids": tokens} if config.is_encoder_decoder else batch

    return create


GROUPED = {"num_key_value_heads": 2}
IMAGES = {"image_size": 64, "patch_size": 16}
T5 = {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 4, "num_heads": 4, "decoder_start_token_id": 0}
BART = {"d_model": 48, "decoder_layers": 6, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "decoder_attention_heads": 4}

NETWORKS: Mapping[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "ViT (timm)": of_timm("vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=6),
    "DeiT-3 (timm)": of_timm("deit3_small_patch16_224", img_size=64, embed_dim=48, num_heads=3, depth=6),
    "EVA-02 (timm)": of_timm("eva02_tiny_patch14_224", img_size=64, patch_size=16, embed_dim=48, num_heads=3, depth=6),
    "Swin (timm)": of_timm("swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24),
    "ConvNeXt (timm)": of_timm("convnext_atto", dims=(12, 24, 48, 96)),
    "ResNet-50 (timm)": of_timm("resnet50", channels=(16, 32, 64, 128)),
    "MLP-Mixer (timm)": of_timm("mixer_s16_224", img_size=64),
    "EfficientNet (timm)": of_timm("efficientnet_b0"),
    "MaxViT (timm)": of_timm("maxvit_rmlp_pico_rw_256", img_size=64),
    "BERT": of_transformers("bert", "AutoModelForMaskedLM"),
    "RoBERTa": of_transformers("roberta", "AutoModelForMaskedLM"),
    "DistilBERT": of_transformers("distilbert", "AutoModelForMaskedLM", dim=48, n_layers=6, n_heads=4, hidden_dim=96),
    "DeBERTa-v2": of_transformers("deberta-v2", "AutoModelForMaskedLM"),
    "ModernBERT": of_transformers("modernbert", "AutoModelForMaskedLM", cls_token_id=1, sep_token_id=2),
    "GPT-2": of_transformers("gpt2", "AutoModelForCausalLM"),
    "Llama": of_transformers("llama", "AutoModelForCausalLM", **GROUPED),
    "Mistral": of_transformers("mistral", "AutoModelForCausalLM", **GROUPED),
    "Qwen3": of_transformers("qwen3", "AutoModelForCausalLM", head_dim=12, **GROUPED),
    "Gemma 2": of_transformers("gemma2", "AutoModelForCausalLM", head_dim=12, **GROUPED),
    "T5": of_transformers("t5", "AutoModelForSeq2SeqLM", **T5),
    "BART": of_transformers("bart", "AutoModelForSeq2SeqLM", **BART),
    "ViT": of_transformers("vit", "AutoModelForImageClassification", **IMAGES),
    "DINOv2": of_transformers("dinov2", "AutoModelForImageClassification", **IMAGES),
    "ALBERT": of_transformers("albert", "AutoModelForMaskedLM", embedding_size=48),
    "Mixtral": of_transformers("mixtral", "AutoModelForCausalLM", num_local_experts=4, **GROUPED),
}


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Compute the mean square of the outputs."""
    output = model(**batch)
    output = output if isinstance(output, Tensor) else output.logits
    return output.float().square().mean()


def gradients_and_bytes(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[list[Tensor], int]:
    """Compute the gradients of all used weights, and the bytes saved for them."""
    torch.manual_seed(0)
    with MemoryTracker() as tracker:
        loss = loss_of(model, batch)
        kept = tracker.live
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [gradient for gradient in found if gradient is not None], kept


def tried(create: Callable[[], tuple[nn.Module, dict[str, Tensor]]], blend: float = 0.1) -> Tried:
    """Make a network reversible, compare it, and undo the conversion.

    Raises:
        ArgumentError: If the network is refused.
    """
    torch.manual_seed(0)
    plain, batch = create()
    plain.train()
    model = revnets.make_reversible(copy.deepcopy(plain), blend, memory="store")
    stored, _ = gradients_and_bytes(copy.deepcopy(model), batch)
    revnets.find_columns(model).memory = "exact"
    exact, kept = gradients_and_bytes(copy.deepcopy(model), batch)
    blocks = sum(len(sequence.block_cells) for sequence in rewired_sequences(model))
    revnets.undo_reversible(model)
    with torch.no_grad():
        undone = torch.equal(loss_of(model.eval(), batch), loss_of(copy.deepcopy(plain).eval(), batch))
    return Tried(blocks, gradients_and_bytes(plain, batch)[1], kept, all_equal(stored, exact), undone)


def main(
    only: Annotated[str | None, typer.Option(help=f"Comma-separated names of {', '.join(NETWORKS)}.")] = None,
) -> None:
    """Try small networks of many architectures."""
    console = new_console()
    names = list(NETWORKS) if only is None else [word.strip() for word in only.split(",")]
    if unknown := sorted(set(names) - set(NETWORKS)):
        raise typer.BadParameter(f"{unknown[0]!r}: choose from {', '.join(NETWORKS)}", param_hint="--only")
    table = new_table(
        "saved for backward, b = 0.1, one step", "", "blocks", "original", "exact", "gradients equal", "undone"
    )
    refused = []
    for name in steps(names, "networks"):
        try:
            found = tried(NETWORKS[name])
        except ArgumentError as error:
            refused.append(f"{name}: {error}")
            continue
        checks = ("yes" if found.equal else "NO", "yes" if found.undone else "NO")
        table.add_row(name, str(found.blocks), megabytes(found.plain), megabytes(found.exact), *checks)
    console.print(table)
    for line in refused:
        console.print(f"refused: {line}")


if __name__ == "__main__":
    run_as_script(main)
