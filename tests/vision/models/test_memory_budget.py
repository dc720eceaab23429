"""A memory budget of a timm model is planned for every entry point of training."""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import vision
from revnets import Memory, MemoryPolicy
from revnets.config.memory_budget import BudgetSpec
from revnets.memory.simulation import simulate
from tests.support.multiprocess import processes

BUDGET = {"budget": "1GiB", "optimizer": "none"}


def create(**options) -> nn.Module:
    torch.manual_seed(0)
    small = {"num_classes": 11, "columns": 2, "depths": (1, 1, 1, 1), "memory": BUDGET}
    return timm.create_model("test_revcol", **{**small, **options}).train()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 96, 96)


ENTRIES = {
    "call": lambda model, x: model(x),
    "features": lambda model, x: model.forward_features(x),
    "intermediates": lambda model, x: model.forward_intermediates(x, indices=[0, 1])[1][1],
    "early": lambda model, x: model.forward_intermediates(x, [0, 1], stop_early=True, intermediates_only=True)[1],
    "compiled": lambda model, x: torch.compile(model, backend="eager")(x),
    "compiled features": lambda model, x: torch.compile(model.forward_features, backend="eager")(x),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_plans(entry: str) -> None:
    model = create()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ENTRIES[entry](model, images()).sum().backward()
    assert model.memory_plan.budget == 2**30
    assert set(model.columns.memory) == {"store"}
    assert model.columns.budget is None


@pytest.mark.parametrize("indices", [(0, 1), (0, 1, 2, 3)])
def test_a_feature_extractor_plans(indices: tuple[int, ...]) -> None:
    features = create(features_only=True, out_indices=indices)
    sum(level.sum() for level in features(images())).backward()
    assert features.model.memory_plan.budget == 2**30
    assert set(features.model.columns.memory) == {"store"}


def test_what_is_planned_is_the_step_of_the_entry() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = create(memory="store")

        def forward(self, x: Tensor) -> Tensor:
            return self.model.forward_features(x)

    model = create()
    model.forward_features(images())
    assert model.memory_plan.chosen.peak == simulate(Features(), (images(),)).peak


def test_a_larger_input_of_the_same_entry_warns_once() -> None:
    model = create()
    model.forward_features(images())
    with pytest.warns(UserWarning, match="the memory plan is for an input of") as caught:
        model.forward_features(images(3))
    assert len(caught) == 1


def test_an_unknown_entry_warns_once() -> None:
    model = create()
    with pytest.warns(UserWarning, match="the memory budget 1GiB is still pending") as caught:
        model.columns(model.stem(images()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.columns(model.stem(images()))
    assert len(caught) == 1
    assert model.columns.budget is not None


def test_evaluation_neither_plans_nor_warns() -> None:
    model = create().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.forward_features(images())
        with torch.no_grad():
            model.train().columns(model.stem(images()))
    assert model.columns.budget is not None


def policy_of(model: vision.RevCol) -> MemoryPolicy:
    modes = [Memory.RECOMPUTE] + [Memory.EXACT] * (model.columns.graph.columns - 1)
    last = len(model.columns.graph.nodes) - 1
    return MemoryPolicy(tuple(modes), frozenset({1, last}), True, BudgetSpec(**BUDGET))


def test_a_pruned_model_keeps_the_memory_policy() -> None:
    model = create(memory="exact")
    model.columns.policy = policy = policy_of(model)
    for other in (model, copy.deepcopy(model)):
        other.prune_intermediate_layers([1])
        assert other.columns.policy == replace(policy, stored=frozenset({1}))


def test_stopping_early_builds_no_module_and_verifies(monkeypatch: pytest.MonkeyPatch) -> None:
    model, built, checked = create(memory="exact"), [], []
    model.columns.verify = True
    initialize = nn.Module.__init__
    monkeypatch.setattr(nn.Module, "__init__", lambda self, *a, **k: built.append(self) or initialize(self, *a, **k))
    run = vision.models.architecture.ReversibleColumns.forward.__globals__["executor"].run
    verify = list(inspect.signature(run).parameters).index("verify")
    monkeypatch.setattr("revnets.engine.executor.run", lambda *a: checked.append(a[verify]) or run(*a))
    model.forward_intermediates(images(), [0, 1], stop_early=True)
    assert not built
    assert checked == [True]


def under_ddp(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        for options in ({}, {"features_only": True, "out_indices": (0, 1)}):
            model = create(**options)
            output = DistributedDataParallel(model)(images())
            sum(level.sum() for level in output).backward()
            planned = model.model if options else model
            assert planned.memory_plan.ranks == 2
            assert set(planned.columns.memory) == {"store"}
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_ddp_plans(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "rendezvous"),)
    mp.start_processes(under_ddp, arguments, nprocs=2, start_method=processes.get_start_method())
