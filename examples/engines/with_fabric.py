"""Train in two processes with Lightning Fabric. `torchrun --nproc-per-node 2 examples/engines/with_fabric.py`"""

from __future__ import annotations

import lightning_fabric
from lightning_fabric import Fabric
from torch import nn
from workload import Samples, main, micro_batches, optimizer_of, reversible

WORKLOADS = ("gpt2", "gpt2-lora", "columns")


def train(model: nn.Module, samples: Samples, memory: str) -> list[float]:
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
    fabric.launch()
    model = reversible(model, memory)  # the only new line
    model, optimizer = fabric.setup(model, optimizer_of(model))
    batches = micro_batches(samples, fabric.global_rank, fabric.world_size)
    losses: list[float] = []
    for batch in fabric.setup_dataloaders(batches, use_distributed_sampler=False):
        loss = model(**batch)["loss"]
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_reduce(loss.detach(), reduce_op="mean").item())
    return losses


if __name__ == "__main__":
    main("fabric", lightning_fabric.__version__, train, WORKLOADS)
