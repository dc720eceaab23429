"""One update does what the configuration says, compared with the same update written out in plain torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

from revnets import plan
from revnets.engine.cell import Gain
from tests.support.errors import raises_error
from tests.support.training_runs import TINY, tiny
from vision.config.run import load_config
from vision.data.dataset import load_data
from vision.data.samplers import Key
from vision.distributed.context import World
from vision.tasks import builders
from vision.training import memory_budget
from vision.training.train_state import TrainState

PLAIN = {
    "mixup": None, "ema": None, "clip_grad": None, "label_smoothing": 0.0, "grad_accum": 1,
    "schedule": {"name": "constant"}, "model": {**TINY["model"], "drop_path": 0.0},
    "optimizer": {"name": "momentum", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return load_data(load_config(tiny("x")).data, seed=0)


@pytest.fixture
def batches(data):
    def draw(count, size):
        return [
            default_collate(data.train.__getitems__([Key(0, batch * size + index) for index in range(size)]))
            for batch in range(count)
        ]

    return draw


@pytest.fixture
def engine(data):
    def make(updates_per_epoch=5, **changes):
        torch.manual_seed(0)
        return TrainState(load_config(tiny("x", **{**PLAIN, **changes})), data, updates_per_epoch)

    return make


def weights(engine):
    return torch.cat([parameter.detach().flatten() for parameter in engine.model.parameters()])


def test_plain_update_is_gradient_descent(engine, batches):
    mine, (batch,) = engine(), batches(1, 24)
    before = weights(mine)
    parameters = list(mine.model.parameters())
    loss = F.cross_entropy(mine.model(batch[0]), batch[1])
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
    assert mine.update(iter([batch]), 1).item() == loss.item()
    torch.testing.assert_close(weights(mine), before - 0.1 * gradient)


def test_accumulation_is_one_large_batch(engine, batches):
    large, small = engine(), engine(grad_accum=4)
    (whole,) = batches(1, 24)
    loss = large.update(iter([whole]), 1)
    torch.testing.assert_close(small.update(iter(batches(4, 6)), 1), loss)
    torch.testing.assert_close(weights(small), weights(large))


@pytest.mark.parametrize(("mode", "clip"), [("norm", 0.01), ("value", 0.001)])
def test_clipping(engine, batches, mode, clip):
    mine = engine(clip_grad=clip, clip_mode=mode)
    before = weights(mine)
    mine.update(iter(batches(1, 24)), 1)
    step = (weights(mine) - before) / 0.1
    size = step.norm() if mode == "norm" else step.abs().max()
    torch.testing.assert_close(size, torch.tensor(clip), rtol=1e-3, atol=0)


def test_schedule_is_warm_up_and_cosine(engine, batches):
    mine = engine(schedule={"warmup_epochs": 0.6, "warmup_lr": 0.001, "min_lr": 0.002}, epochs=2)
    seen = [mine.lr]
    for step, batch in enumerate(batches(10, 4), 1):
        mine.update(iter([batch]), step)
        seen.append(mine.lr)
    warm, total = 3, 10
    expected = [
        0.001 + 0.099 * t / warm if t < warm else 0.002 + 0.098 * (1 + math.cos(math.pi * t / total)) / 2
        for t in range(total)
    ]
    assert seen == pytest.approx([*expected, 0.002])


def test_neither_gains_nor_other_vectors_decay(engine):
    mine = engine(optimizer={"name": "adamw", "lr": 0.1, "weight_decay": 0.3})
    decays = {id(p): group["weight_decay"] for group in mine.optimizer.param_groups for p in group["params"]}
    gains = [module.weight for module in mine.model.modules() if isinstance(module, Gain)]
    assert len(gains) == 4
    assert {decays[id(gain)] for gain in gains} == {0.0}
    assert all(decays[id(p)] == (0.3 if p.ndim > 1 else 0.0) for p in mine.model.parameters())
    assert len(decays) == len(list(mine.model.parameters()))


def test_averaged_weights(engine, batches):
    mine = engine(ema={"decay": 0.75, "warmup": False})
    expected = None
    for step, batch in enumerate(batches(4, 8), 1):
        mine.update(iter([batch]), step)
        now = weights(mine)
        expected = now if expected is None else 0.75 * expected + 0.25 * now
    averaged = torch.cat([parameter.flatten() for parameter in mine.ema.parameters()])
    torch.testing.assert_close(averaged, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
def test_loss(engine, smoothing, mixed):
    """Against torch's own cross entropy: smoothed labels, and labels mixed half and half."""
    mixup = {"mixup_alpha": 0.5, "mode": "batch"} if mixed else None
    mine = engine(label_smoothing=smoothing, mixup=mixup)
    scores, labels = torch.randn(6, 10), torch.arange(6)
    images = torch.randn(6, 1, 8, 8)
    if not mixed:
        expected = F.cross_entropy(scores, labels, label_smoothing=smoothing)
        torch.testing.assert_close(mine.training_task.criterion(scores, labels), expected)
        return
    original = images.clone()
    mixed_images, soft = mine.augment((images, labels))
    part = ((mixed_images - original.flip(0)) / (original - original.flip(0)))[0, 0, 0, 0]
    hard = part * F.one_hot(labels, 10) + (1 - part) * F.one_hot(labels.flip(0), 10)
    expected = F.cross_entropy(scores, hard.float(), label_smoothing=smoothing)
    torch.testing.assert_close(mine.training_task.criterion(scores, soft), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("amp", "tolerance"), [("bfloat16", 0.02), ("float16", 0.003)])
def test_mixed_precision(engine, batches, amp, tolerance):
    full, mixed = engine(), engine(amp=amp)
    if mixed.scaler.is_enabled():  # it begins with a scale that overflows here, and would skip some updates
        mixed.scaler.load_state_dict({**mixed.scaler.state_dict(), "scale": 1024.0})
    batch = batches(1, 24)
    before = weights(full)
    losses = [item.update(iter(batch), 1) for item in (full, mixed)]
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=tolerance)
    steps = [weights(item) - before for item in (full, mixed)]
    assert steps[1].dtype == torch.float32
    assert not torch.equal(*steps)
    assert ((steps[1] - steps[0]).norm() / steps[0].norm()).item() < 10 * tolerance


def test_float16_overflow_skips_the_update_and_halves_the_scale(engine, batches):
    mine = engine(amp="float16", clip_grad=1.0)
    assert mine.scaler.is_enabled()
    mine.scaler.load_state_dict({**mine.scaler.state_dict(), "scale": 2.0**100})
    before = weights(mine)
    assert mine.update(iter(batches(1, 24)), 1).isfinite()
    assert torch.equal(weights(mine), before)
    assert mine.scaler.get_scale() == 2.0**99


def test_compiled_cells_and_channels_last_compute_the_same(engine, batches):
    """Against an eager engine: losses and weights after three updates, in `exact`, with mixup and drop path."""
    changes = {"model": TINY["model"], "mixup": TINY["mixup"], "memory": "exact"}
    plain, other = engine(**changes), engine(**changes, compile="aot_eager", channels_last=True)
    cell = other.model.columns.flat()[0]
    assert cell.function._compiled_call_impl is not None
    assert plain.model.columns.flat()[0].function._compiled_call_impl is None
    for step, batch in enumerate(batches(3, 24), 1):
        losses = [item.update(iter([[part.clone() for part in batch]]), step) for item in (plain, other)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights(other), weights(plain), rtol=1e-4, atol=1e-5)


def test_random_numbers_are_functions_of_seed_and_forward_pass(engine, batches):
    """Whatever happens to the generators of the process, and whatever other passes there were."""
    changes = {"model": TINY["model"], "mixup": TINY["mixup"]}
    (batch,) = batches(1, 24)
    mine, other = engine(**changes), engine(**changes)
    torch.rand(7)
    losses = [item.update(iter([[part.clone() for part in batch]]), 5) for item in (mine, other)]
    assert torch.equal(*losses)
    assert torch.equal(weights(mine), weights(other))
    later = engine(**changes).update(iter([[part.clone() for part in batch]]), 6)
    reseeded = engine(**changes, seed=2).update(iter([[part.clone() for part in batch]]), 5)
    assert later != losses[0]
    assert reseeded != losses[0]


def test_a_budget_is_planned_before_training(engine, batches):
    free, tight = (engine(memory={"budget": budget}, batch_size=24) for budget in ("8GiB", "200kB"))
    assert "store" in free.note
    assert set(free.model.columns.memory) == {"store"}
    assert "store" not in tight.model.columns.memory
    assert 0 < len(tight.model.columns.stored) < 6
    assert engine(memory="exact").note is None
    model = {"timm": "test_revcol", "patch_size": 2, "dims": [4, 4, 6, 6]}
    heads = [engine(model=model, memory={"budget": "8GiB"}, supervision=given).note for given in ({"heads": 2}, None)]
    assert heads[0] != heads[1]  # what heads take is planned for
    (batch,) = batches(1, 24)
    losses = [item.update(iter([[part.clone() for part in batch]]), 1) for item in (free, tight)]
    assert torch.equal(*losses)
    with raises_error(code="over-budget", key="memory.budget", names="batch_size"):
        engine(memory={"budget": "1kB"}, batch_size=24)


def test_a_run_stays_within_its_budget(data, monkeypatch):
    """Its own optimizer and the averaged weights by their sizes, gradients all along where they are accumulated."""
    asked, model = [], builders.build_model(load_config(tiny("x", **PLAIN)), data)

    def keep(memory, **changes):
        memory_budget.plan_run_memory(
            load_config(tiny("x", **{**PLAIN, **changes}, memory=memory)), model, data.shape, World()
        )

    monkeypatch.setattr(memory_budget, "plan", lambda *_, **request: asked.append(request) or plan(*_, **request))
    for changes, states, grad_accum in (
        ({}, 0, 1),  # plain gradient descent, without momentum
        ({"optimizer": {"name": "adamw"}}, 2, 1),
        ({"optimizer": {"name": "sgd"}, "grad_accum": 3}, 1, 3),
        ({"optimizer": {"name": "lion", "layer_decay": 0.9}, "ema": {"decay": 0.9}}, 2, 1),
        ({"optimizer": {"name": "adafactor"}}, 0, 1),
        ({"optimizer": {"name": "adahessian"}}, 2, 1),  # its step wants more than a gradient
    ):
        keep({"budget": "8GiB"}, **changes)
        assert (asked[-1]["optimizer"], asked[-1]["grad_accum"]) == (states, grad_accum)
    keep({"budget": "8GiB", "optimizer": "none", "grad_accum": 2})
    assert (asked[-1]["optimizer"], asked[-1]["grad_accum"]) == (0, 2)


def test_evaluation_is_that_of_the_weights_and_of_their_average(engine, batches, data):
    mine = engine(ema={"decay": 0.9, "warmup": False}, model=TINY["model"])
    for step, batch in enumerate(batches(3, 24), 1):
        mine.update(iter([batch]), step)
    images, labels = default_collate([data.val[index] for index in range(7)])
    mine.training_task.train()
    ticks = []
    found = mine.evaluate([(images[:4], labels[:4]), (images[4:], labels[4:])], lambda: ticks.append(1))
    assert len(ticks) == 4
    assert mine.model.training
    for name, model in (("raw", mine.model), ("ema", mine.ema)):
        scores = model.eval()(images)
        assert found[name].images == 7
        assert found[name].loss == pytest.approx(F.cross_entropy(scores, labels).item(), abs=1e-6)
        assert found[name].top1 == pytest.approx(100 * (scores.argmax(1) == labels).float().mean().item())
        expected = torch.zeros(10, 10, dtype=torch.long)
        for label, guess in zip(labels.tolist(), scores.argmax(1).tolist(), strict=True):
            expected[label, guess] += 1
        assert torch.equal(found[name].confusion, expected)
    assert found["raw"].loss != found["ema"].loss


@pytest.mark.parametrize(
    ("changes", "code", "key", "names"),
    [
        (
            {"model": {**TINY["model"], "head": {"type": "classifier", "num_classes": 9}}},
            "class-mismatch",
            "model.head",
            ["9 scores", "10 classes", "num_classes: 10"],
        ),
        (
            {"model": {**TINY["model"], "stem": {"type": "patchify", "in_chans": 3}}},
            "input-rejected",
            "model",
            ["1 x 8 x 8", "stem"],
        ),
        ({"model": {**TINY["model"], "head": None}}, "shape-mismatch", "model", "head"),
        ({"model": {**TINY["model"], "taps": [0]}}, "shape-mismatch", "model", "taps"),
        ({"optimizer": {"options": {"beta": 3}}}, "component-failed", "optimizer.options", ["adamw", "beta"]),
        ({"device": "cuda:77"}, "unusable-device", "device", ["cuda:77", "auto"]),
        ({"device": "meta"}, "unusable-device", "device", ["meta", "auto"]),
        ({"device": "hpu"}, "unusable-device", "device", ["hpu", "auto"]),
    ],
)
def test_settings_that_do_not_fit_data_or_machine_are_refused(engine, changes, code, key, names):
    with raises_error(code=code, key=key, source="training run", names=names):
        engine(**changes)
