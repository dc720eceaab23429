"""The networks that `finetuning.py` trains, and the ways to train them in less memory.

A way changes a network in place: around its blocks (checkpointing, compilation, reversible blocks), or around its
forward (hooks for what autograd saves). Networks of one kind and seed have the same weights.
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

# ---------------------------------------------------------------------------------------------- what is trained


class Network(nn.Module):
    """A model with a stack of residual blocks, a batch for it, and its loss.

    Attributes:
        stack: name of the container of the blocks.
        batch: input of the forward, which returns the loss.
        rewires: does a memory mode change the function that is trained?
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
        """Put these in the places of the blocks; there may be fewer of them."""
        del self.container[len(modules) :]
        for index, module in enumerate(modules):
            self.container[index] = module

    def set_memory(self, memory: str) -> None:
        """Make the blocks reversible, in this memory mode."""
        revnets.make_reversible(self, blocks=self.stack, memory=memory)


class Classifier(Network):
    """A vision transformer (timm): a ViT-S of fewer channels.

    Args:
        depth: number of blocks.
        width: channels, a multiple of 64.
        size: side of the images; patches have 16 x 16 pixels.
        count: images of the batch.
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
    """A network of GPT-2's shape (transformers), without dropout.

    The vocabulary is small, so that logits do not hide the blocks: with the 50,257 tokens of GPT-2 they and their
    gradients take more than all else.

    Args:
        depth: number of blocks.
        width: channels, a multiple of 64.
        size: tokens of a text.
        count: texts of the batch.
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

# ----------------------------------------------------------------------------------------------- ways to train it


class CheckpointedBlocks(nn.Module):
    """Consecutive blocks under one `torch.utils.checkpoint`, in the place of a single block."""

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
    """Every second block is checkpointed; the others keep all that they save."""
    return (block if index % 2 else CheckpointedBlocks([block]) for index, block in enumerate(blocks))


def checkpoint_pairs(blocks: list[nn.Module]) -> Iterator[nn.Module]:
    """The input of every second block is kept, and two blocks are replayed at once."""
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
    """The results of matrix products and attention are kept; norms and activations are replayed."""
    contexts = partial(create_selective_checkpoint_contexts, PRODUCTS)
    return (CheckpointedBlocks([block], context_fn=contexts) for block in blocks)


def compile_under(budget: float, blocks: list[nn.Module]) -> Iterator[nn.Module]:
    """Each block compiled, with this share of what autograd would save; kernels stay those of eager PyTorch."""
    from torch._dynamo.backends.debugging import aot_eager_decomp_partition

    def partitioned(*args: Any) -> Any:
        with functorch_config.patch(activation_memory_budget=budget):
            return aot_eager_decomp_partition(*args)

    for block in blocks:
        block.compile(backend=partitioned)
        yield block


class Quantized(NamedTuple):
    """Codes of 8 bits, and the scale and the least number of each row."""

    codes: Tensor
    scale: Tensor
    low: Tensor


def in_int8(network: Network) -> AbstractContextManager[None]:
    """What autograd saves is rounded to 256 steps between the least and the greatest number of a row."""
    weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}

    def pack(tensor: Tensor) -> Tensor | Quantized:
        is_row_wise = tensor.is_floating_point() and tensor.dim() > 1 and tensor.shape[-1] > 8  # no statistics of norms
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
    """`save_on_cpu` for a device that is simulated.

    Copies for the host are arrays of NumPy, which a tracker of tensors sees no more than the allocator of a GPU does.
    """

    def pack(tensor: Tensor) -> Any:
        return tensor.detach().numpy().copy(order="K")

    def unpack(array: Any) -> Tensor:
        return torch.from_numpy(array).clone()

    return saved_tensors_hooks(pack, unpack)


Wrap = Callable[[list[nn.Module]], Iterator[nn.Module]]


class Way(NamedTuple):
    """One way to train a network.

    Args:
        wrap: modules that take the places of the blocks.
        hooks: context of the forward.
        memory: rewire the blocks, in this memory mode.
        budget: a memory mode or another way, whose peak the plan of the rewired network may reach.
        is_timed: does its time on a CPU mean anything?
        function: a name of what the network computes, where it is neither the network as it is nor rewired. Gradients
            are compared with those of the first way of the same function.
    """

    wrap: Wrap | None = None
    hooks: Callable[[Network], AbstractContextManager[None]] = nullcontext
    memory: str | None = None
    budget: str | None = None
    is_timed: bool = True
    function: str = ""

    def apply(self, network: Network) -> None:
        """Change a fresh network so that it is trained in this way."""
        if self.memory is not None:
            network.set_memory(self.memory)
        if self.wrap is not None:
            network.replace_blocks(list(self.wrap(network.blocks)))

    def function_of(self, network: Network) -> str:
        """The function that the network computes when it is trained in this way."""
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
"""From `rewired, store` on, the rewired network is trained, before that the network as it is."""
