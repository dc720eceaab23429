"""Networks of `finetuning.py`, and methods to train them in less memory.

A method changes a network in place: its blocks (checkpointing, compilation, reversible blocks), or its forward (hooks
on saved tensors). Networks of one kind and seed have the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import revnets

# ------------------------------------------------------------------------------------------------------- networks


class Network(nn.Module):
    """A model with a stack of residual blocks, a batch for it, and its loss.

    Attributes:
        stack: Name of the container of the blocks.
        batch: Input of the forward, which returns the loss.
        rewires: Whether making the blocks reversible changes the function that is trained.
    """

    stack: str
    batch: Tensor
    rewires = True

    @property
    def container(self) -> nn.Sequential | nn.ModuleList:
        return cast("nn.Sequential | nn.ModuleList", self.get_submodule(self.stack))

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.container)

    def replace_blocks(self, modules: list[nn.Module]) -> None:
        """Replace the blocks by these modules, which may be fewer."""
        del self.container[len(modules) :]
        for index, module in enumerate(modules):
            self.container[index] = module

    def set_memory(self, memory: str) -> None:
        """Make the blocks reversible, in this memory mode."""
        revnets.make_reversible(self, blocks=self.stack, memory=memory)


class Classifier(Network):
    """A ViT-S of timm with fewer channels.

    Args:
        depth: Number of blocks.
        width: Channels, a multiple of 64.
        size: Side of the images; patches have 16 x 16 pixels.
        count: Images per batch.
    """

    stack = "model.blocks"

    def __init__(self, depth: int, width: int, size: int, count: int):
        super().__init__()
        import timm

        shape = {"img_size": size, "embed_dim": width, "depth": depth, "num_heads": width // 64}
        self.model = timm.create_model("vit_small_patch16_224", num_classes=100, **shape)
        self.batch = torch.randn(count, 3, size, size)
        self.labels = torch.randint(100, (count,))

    def forward(self, images: Tensor) -> Tensor:
        return F.cross_entropy(self.model(images), self.labels)


class LanguageModel(Network):
    """A network with GPT-2's structure (transformers), without dropout.

    The vocabulary is small, because with the 50,257 tokens of GPT-2 the logits and their gradients would take more
    memory than everything else.

    Args:
        depth: Number of blocks.
        width: Channels, a multiple of 64.
        size: Tokens per text.
        count: Texts per batch.
    """

    stack = "model.transformer.h"
    vocabulary = 1024

    def __init__(self, depth: int, width: int, size: int, count: int):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=self.vocabulary,
            n_positions=size,
            n_embd=width,
            n_layer=depth,
            n_head=width // 64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
        self.model = GPT2LMHeadModel(config)
        self.batch = torch.randint(self.vocabulary, (count, size))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, labels=tokens).loss


class Case(NamedTuple):
    """A network and the size of its batch."""

    kind: Callable[[int, int, int, int], Network]
    depth: int
    width: int
    size: int
    count: int
    words: str
    unit: str = "blocks"

    def build(self) -> Network:
        torch.manual_seed(0)
        return self.kind(self.depth, self.width, self.size, self.count).train()

    @property
    def title(self) -> str:
        return f"{self.words}: {self.depth} {self.unit}, {self.width} channels, batch {self.count}, size {self.size}"


CASES = {
    "vit": Case(Classifier, 12, 128, 224, 16, "ViT-S"),
    "gpt2": Case(LanguageModel, 12, 128, 256, 12, "GPT-2"),
}

# -------------------------------------------------------------------------------------------------------- methods


class CheckpointedBlocks(nn.Module):
    """Consecutive blocks under one `torch.utils.checkpoint`."""

    def __init__(self, blocks: list[nn.Module], **options: Any):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.options = options

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(self._run, x, *args, **kwargs, use_reentrant=False, **self.options)

    def _run(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, *args, **kwargs)
        return x


def checkpoint_each(blocks: list[nn.Module]) -> Iterator[nn.Module]:
    return (CheckpointedBlocks([block]) for block in blocks)


def checkpoint_alternate(blocks: list[nn.Module]) -> Iterator[nn.Module]:
    """Checkpoint every second block; the others save everything."""
    return (block if index % 2 else CheckpointedBlocks([block]) for index, block in enumerate(blocks))


def checkpoint_pairs(blocks: list[nn.Module]) -> Iterator[nn.Module]:
    """Checkpoint pairs of blocks: save the input of every second block and replay two at once."""
    return (CheckpointedBlocks(blocks[start : start + 2]) for start in range(0, len(blocks), 2))


PRODUCTS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten.convolution.default,
]


def checkpoint_selectively(blocks: list[nn.Module]) -> Iterator[nn.Module]:
    """Save results of matrix products and attention; replay norms and activations."""
    contexts = partial(create_selective_checkpoint_contexts, PRODUCTS)
    return (CheckpointedBlocks([block], context_fn=contexts) for block in blocks)


def compile_under(budget: float, blocks: list[nn.Module]) -> Iterator[nn.Module]:
    """Compile each block with this fraction of the saved activations; kernels stay those of eager PyTorch."""
    from torch._dynamo.backends.debugging import aot_eager_decomp_partition

    def partitioned(*args: Any) -> Any:
        with functorch_config.patch(activation_memory_budget=budget):
            return aot_eager_decomp_partition(*args)

    for block in blocks:
        block.compile(backend=partitioned)
        yield block


class Quantized(NamedTuple):
    """8-bit codes, and the scale and the minimum of each row."""

    codes: Tensor
    scale: Tensor
    low: Tensor


def in_int8(network: Network) -> AbstractContextManager[None]:
    """Round saved tensors to 256 steps between the minimum and the maximum of each row."""
    weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}

    def pack(tensor: Tensor) -> Tensor | Quantized:
        is_row_wise = (
            tensor.is_floating_point() and tensor.dim() > 1 and tensor.shape[-1] > 8
        )  # excludes statistics of norms
        if not is_row_wise or tensor.untyped_storage().data_ptr() in weights:
            return tensor
        low, high = tensor.aminmax(dim=-1, keepdim=True)
        scale = ((high - low) / 255).clamp_min_(torch.finfo(tensor.dtype).tiny)
        return Quantized(((tensor - low).div_(scale)).round_().to(torch.uint8), scale, low)

    def unpack(packed: Tensor | Quantized) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return packed.codes.to(packed.low.dtype).mul_(packed.scale).add_(packed.low)

    return saved_tensors_hooks(pack, unpack)


def on_host(_: Network) -> AbstractContextManager[None]:
    """Simulate `save_on_cpu` for a device.

    Host copies are NumPy arrays, which the tensor tracker does not count, like the allocator of a GPU.
    """

    def pack(tensor: Tensor) -> Any:
        return tensor.detach().numpy().copy(order="K")

    def unpack(array: Any) -> Tensor:
        return torch.from_numpy(array).clone()

    return saved_tensors_hooks(pack, unpack)


Wrap = Callable[[list[nn.Module]], Iterator[nn.Module]]


class Way(NamedTuple):
    """One method to train a network.

    Args:
        wrap: Returns the modules that replace the blocks.
        hooks: Context of the forward.
        memory: Make the blocks reversible, in this memory mode.
        budget: A memory mode or another method, whose peak is the budget of the reversible network.
        is_timed: Whether its time on a CPU is meaningful.
        function: Name of the computed function, if it is neither the original network nor the reversible one. Gradients
            are compared with those of the first method with the same function.
    """

    wrap: Wrap | None = None
    hooks: Callable[[Network], AbstractContextManager[None]] = nullcontext
    memory: str | None = None
    budget: str | None = None
    is_timed: bool = True
    function: str = ""

    def apply(self, network: Network) -> None:
        """Apply the method to a new network, in place."""
        if self.memory is not None:
            network.set_memory(self.memory)
        if self.wrap is not None:
            network.replace_blocks(list(self.wrap(network.blocks)))

    def function_of(self, network: Network) -> str:
        """Return the name of the function that the network computes with this method."""
        return self.function or ("rewired" if self.memory is not None and network.rewires else "plain")


STORE, REWIRED = "store", "rewired, store"

CHECKPOINTS = {
    "checkpoint each block": Way(checkpoint_each),
    "checkpoint pairs of blocks": Way(checkpoint_pairs),
    "checkpoint every 2nd block": Way(checkpoint_alternate),
    "checkpoint selectively": Way(checkpoint_selectively),
}

WAYS = {
    STORE: Way(),
    **CHECKPOINTS,
    **{f"compile, budget {budget:g}": Way(partial(compile_under, budget)) for budget in (0.5, 0.25, 0.0)},
    "int8": Way(hooks=in_int8),
    "save_on_cpu": Way(hooks=on_host, is_timed=False),
    REWIRED: Way(memory="store"),
    "exact": Way(memory="exact"),
    "exact, budget: exact": Way(memory="exact", budget="exact"),
    **{f"exact, budget: {name}": Way(memory="exact", budget=name) for name in CHECKPOINTS},
}
"""Methods from `rewired, store` on train the reversible network, the others the original one."""
