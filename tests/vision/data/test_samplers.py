"""Order and augmentation only depend on (seed, epoch, index)."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import default_collate

from tests.support.errors import raises_error
from tests.support.training_runs import tiny
from vision.config.data import DigitsConfig
from vision.config.run import load_config
from vision.data.dataset import load_data
from vision.data.in_memory import RandomAffine
from vision.data.samplers import EpochBatches, Key, TrainBatches, val_loader


def test_digits_are_split_evenly_and_without_overlap():
    data = load_data(DigitsConfig(img_size=8, shift=0, rotate=0, scale=0), seed=0)
    train = default_collate(data.train.__getitems__([Key(0, index) for index in range(len(data.train))]))
    val = default_collate([data.val[index] for index in range(len(data.val))])
    assert (len(data.train), len(data.val), len(data.classes), data.shape) == (1437, 360, 10, (1, 8, 8))
    shares = [torch.bincount(labels, minlength=10) / len(labels) for labels in (train[1], val[1])]
    torch.testing.assert_close(*shares, rtol=0, atol=0.005)
    assert abs(train[0].mean().item()) < 1e-4
    assert abs(train[0].std().item() - 1) < 1e-4
    seen = {image.numpy().tobytes() for image in train[0]}
    assert sum(image.numpy().tobytes() in seen for image in val[0]) == 0


@given(
    length=st.integers(1, 97),
    batch_size=st.integers(1, 7),
    accum=st.integers(1, 3),
    world_size=st.integers(1, 3),
    epoch=st.integers(0, 5),
    data=st.data(),
)
def test_batches_of_an_epoch(length, batch_size, accum, world_size, epoch, data):
    def batches(rank=0, world_size=world_size, accum=accum, start=0, epoch=epoch):
        sampler = EpochBatches(length, batch_size, accum, seed=3, rank=rank, world_size=world_size)
        sampler.begin(epoch, start)
        assert len(sampler) == len(list(sampler))
        return list(sampler)

    updates = length // (batch_size * accum * world_size)
    if updates == 0:
        with raises_error(ValueError, code="too-few-samples", names=str(length)):
            batches()
        return
    ranks = [batches(rank) for rank in range(world_size)]
    keys = [key for rank in ranks for batch in rank for key in batch]
    assert len({key.index for key in keys}) == len(keys) == updates * batch_size * accum * world_size
    assert {key.epoch for key in keys} == {epoch}
    assert batches() == ranks[0]  # iterating again returns the same
    # Several processes see together, update by update, what one process with accumulation sees.
    one = batches(world_size=1, accum=accum * world_size)
    assert one == [batch for same in zip(*ranks, strict=True) for batch in same]
    start = data.draw(st.integers(0, updates))
    assert batches(start=start) == ranks[0][start * accum :]


def test_each_epoch_has_its_own_order():
    sampler = EpochBatches(97, 97, 1, seed=0)
    orders = []
    for epoch in range(3):
        sampler.begin(epoch)
        orders.append(tuple(key.index for key in next(iter(sampler))))
    assert len(set(orders)) == 3
    other = EpochBatches(97, 97, 1, seed=1)
    assert tuple(key.index for key in next(iter(other))) != orders[0]


def test_workers_and_resuming_do_not_change_images(tmp_path):
    def epoch(workers, start):
        config = load_config(tiny(tmp_path, workers=workers, batch_size=239, grad_accum=1, mixup=None))
        return list(TrainBatches(config, load_data(config.data, config.seed)).epoch(4, start))

    reference, by_workers, resumed = epoch(0, 0), epoch(2, 0), epoch(0, 2)
    assert len(reference) == 6
    for batches, expected in ((by_workers, reference), (resumed, reference[2:])):
        for batch, wanted in zip(batches, expected, strict=True):
            assert all(torch.equal(mine, other) for mine, other in zip(batch, wanted, strict=True))


def test_augmentation_differs_by_epoch_and_seed_and_not_by_batch():
    images = torch.rand(5, 1, 8, 8)
    config = DigitsConfig()
    keys = [Key(2, index) for index in range(5)]
    out = RandomAffine(config, seed=1)(images, keys)
    alone = RandomAffine(config, seed=1)(images[3:4], keys[3:4])
    assert torch.equal(out[3:4], alone)
    assert not torch.equal(out, RandomAffine(config, seed=2)(images, keys))
    assert not torch.equal(out, RandomAffine(config, seed=1)(images, [Key(3, index) for index in range(5)]))
    still = RandomAffine(DigitsConfig(shift=0, rotate=0, scale=0), seed=1)
    assert torch.equal(still(images, keys), images)


def test_augmentation_has_the_configured_range():
    side, count = 64, 50
    axis = (torch.arange(side) + 0.5) / side - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    blob = torch.exp(-((x / 0.12) ** 2 + (y / 0.05) ** 2) / 2)  # wide and low, in the center
    images, keys = blob.expand(count, 1, side, side), [Key(0, index) for index in range(count)]

    def moments(**limits):
        config = DigitsConfig(**{"shift": 0.0, "rotate": 0.0, "scale": 0.0, **limits})
        mass = RandomAffine(config, seed=0)(images, keys)[:, 0]
        mass = mass / mass.sum((1, 2), keepdim=True)
        cx, cy = (mass * x).sum((1, 2)), (mass * y).sum((1, 2))
        dx, dy = x - cx[:, None, None], y - cy[:, None, None]
        xx, yy, xy = ((mass * product).sum((1, 2)) for product in (dx * dx, dy * dy, dx * dy))
        return cx, cy, (xx + yy) / (blob / blob.sum() * (x * x + y * y)).sum(), 0.5 * torch.atan2(2 * xy, xx - yy)

    def spread(values, limit):
        assert values.abs().max() <= limit * 1.03
        assert values.max() > 0.7 * limit
        assert values.min() < -0.7 * limit

    cx, cy, _, _ = moments(shift=0.1)
    spread(cx, 0.1)
    spread(cy, 0.1)
    spread(moments(rotate=20.0)[3], math.radians(20))
    spread(moments(scale=0.2)[2].sqrt() - 1, 0.2)


def test_loaders_do_not_use_the_global_generator(tmp_path):
    config = load_config(tiny(tmp_path))
    data = load_data(config.data, config.seed)
    before = torch.get_rng_state()
    assert sum(len(labels) for _, labels in TrainBatches(config, data).epoch(0)) == 1200
    assert sum(len(labels) for _, labels in val_loader(config, data)) == 360
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    config = load_config(tiny(tmp_path, batch_size=720, grad_accum=2))
    with raises_error(code="too-few-samples", key="batch_size", source="training run", names=["1437", "1440"]):
        TrainBatches(config, load_data(config.data, config.seed))
