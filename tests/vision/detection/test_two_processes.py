"""Detectors in two processes with DistributedDataParallel, on scenes."""

import copy
import importlib
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("skimage")
pytest.importorskip("faster_coco_eval")
pytest.importorskip("scipy")

from tests.support.fashion_mnist import make_files
from tests.support.paths import ROOT
from tests.support.two_processes import in_two_processes
from vision.config.run import load_config
from vision.data.samplers import Key
from vision.tasks import create_task

SMALL = ["model.dims=[4, 6, 8, 12]", "model.columns=2", "data.short_sides=[64]", "data.long_side=96"]
OPTIONS = {
    "detection": {"channels": 8, "width": 16, "mask_width": 8},
    "dino": {"width": 32, "feedforward": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 2}
    | {"queries": 20, "denoising": 4},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples/scenes")
        importlib.import_module("make_scenes").make(directory / "made", 4, 1, 5, make_files(directory))
    return directory / "made"


def gradients(model, batch, rank):
    torch.manual_seed(rank)
    sum(model(*batch).values()).backward()
    return {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}


def _update(root, name, rank):
    found = {}
    for memory in ("store", "exact"):
        options = {key: str(value) for key, value in OPTIONS[name].items()}
        changes = [f"task.options.{key}={value}" for key, value in options.items()]
        config = load_config(
            str(ROOT / f"examples/scenes/{name}.yaml"), [*SMALL, *changes, f"data.root={root}", f"memory={memory}"]
        )
        task = create_task(config)
        data = task.load_data()
        batch = task.collate([data.train[Key(0, 2 * rank + image)] for image in range(2)])
        torch.manual_seed(7)
        model = task.build_model(data)
        alone = gradients(copy.deepcopy(model), batch, rank)
        distributed = DistributedDataParallel(model)
        found[memory] = gradients(distributed, batch, rank)
        for key, gradient in found[memory].items():
            mean = alone[key].clone()
            dist.all_reduce(mean)
            assert torch.equal(mean / 2, gradient), key
        found[memory] = {key: gradient.clone() for key, gradient in found[memory].items()}
        torch.optim.SGD(model.parameters(), 0.1).step()
        gradients(distributed, batch, rank)  # fails where a parameter took no part in the update before
    assert [key for key, gradient in found["exact"].items() if not torch.equal(gradient, found["store"][key])] == []


@pytest.mark.parametrize("name", OPTIONS)
def test_ddp_averages_gradients_and_exact_equals_store(root, tmp_path, name):
    in_two_processes(partial(_update, root, name), tmp_path)
