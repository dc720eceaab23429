"""Intermediate supervision: positions of the heads, the loss, training, and removal of the heads."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models import group_parameters
from torch.testing import assert_close

from revnets.config.errors import explain, path
from tests.support.errors import raises_error
from tests.support.supervision_tasks import CLASSES, batch, create_task
from vision.config.learning import SupervisionConfig
from vision.supervision.supervised import HeadsEvaluator, Supervised

# ------------------------------------------------------------------------------------------------- where heads stand


def test_the_paper_s_heads_and_weights() -> None:
    """Section 2.3 and D.1: alpha (3, 2, 1, 0), beta (0.18, 0.35, 0.53, 1) at every quarter of the columns."""
    for columns in (4, 8, 16):
        stops = SupervisionConfig().stops(columns)
        assert [stop.column + 1 for stop in stops] == [columns // 4, columns // 2, 3 * columns // 4, columns]
        assert [stop.alpha for stop in stops] == pytest.approx([3, 2, 1, 0])
        assert [stop.beta for stop in stops] == pytest.approx([0.18, 0.35, 0.53, 1], abs=0.0051)


@pytest.mark.parametrize("heads", range(1, 8))
@pytest.mark.parametrize("columns", range(1, 20))
def test_heads_are_evenly_spaced(columns: int, heads: int) -> None:
    stops = SupervisionConfig(heads=heads).stops(columns)
    ends = [stop.column + 1 for stop in stops]
    assert len(ends) == len(set(ends)) == min(heads, columns)
    assert ends[-1] == columns
    for index, end in enumerate(ends):
        assert abs(end - columns * (index + 1) / len(ends)) <= 0.5
    alphas, betas = [stop.alpha for stop in stops], [stop.beta for stop in stops]
    assert alphas == sorted(alphas, reverse=True)
    assert betas == sorted(betas)
    assert (alphas[-1], betas[-1]) == (0, 1)
    assert len(ends) == 1 or alphas[0] == 3


def test_other_schedules() -> None:
    cosine = SupervisionConfig(schedule="cosine", alpha=2.0, beta=1.0).stops(8)
    assert [stop.alpha for stop in cosine] == pytest.approx([2, 1.5, 0.5, 0])
    assert [stop.beta for stop in cosine] == pytest.approx([0.1464, 0.5, 0.8536, 1], abs=1e-4)
    constant = SupervisionConfig(schedule="constant", alpha=2.0, beta=0.5).stops(8)
    assert [stop[1:] for stop in constant] == [(2, 0.5), (2, 0.5), (2, 0.5), (0, 1)]
    given = SupervisionConfig(heads=2, alpha=[1, 0.5], beta=[0, 2]).stops(8)
    assert given == [(3, 1, 0), (7, 0.5, 2)]


@pytest.mark.parametrize(
    ("options", "key", "code"),
    [
        ({"alpha": [1.0, 2.0]}, "alpha", "wrong-length"),
        ({"alpha": -1.0}, "alpha", "out-of-range"),
        ({"beta": [1.0, 1.0, 1.0, 0.0]}, "beta", "out-of-range"),
        ({"heads": 0}, "heads", "out-of-range"),
        ({"decoder": "deep"}, "decoder", "unknown-choice"),
        ({"alhpa": 1.0}, "alhpa", "unknown-key"),
    ],
)
def test_wrong_configurations(options: dict, key: str, code: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SupervisionConfig(**options)
    complaint = explain(caught.value, options, SupervisionConfig)
    assert (path(complaint.keys), complaint.code) == (key, code)


def test_what_does_not_fit_the_model() -> None:
    with raises_error(ValueError, code="wrong-length", key="heads", names=["4 heads", "2 columns"]):
        create_task(2, config=SupervisionConfig(alpha=[3, 2, 1, 0]))
    with raises_error(ValueError, code="invalid-value", key="num_classes"):
        Supervised(timm.create_model("test_revcol", num_classes=0), SupervisionConfig())
    with raises_error(ValueError, code="wrong-length", key="mean", names=["3 values", "5 channels"]):
        create_task(in_chans=5)
    assert create_task(in_chans=5, mean=[0.5], std=[0.5])(torch.randn(2, 5, 32, 32), torch.tensor([0, 1]))["loss"] > 0


# ---------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 8])
def test_compound_loss(columns: int) -> None:
    """The features equal those of forward passes through shorter networks, for any number of columns."""
    task, (images, labels) = create_task(columns), batch()
    result = task(images, labels)
    supervised = task.supervised()
    model = supervised.model
    pixels = images * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + torch.tensor([0.485, 0.456, 0.406]).view(
        3, 1, 1
    )
    total = 0
    for column, alpha, beta in supervised.stops:
        shorter = timm.create_model("test_revcol", num_classes=CLASSES, columns=column + 1)
        shorter.load_state_dict(model.state_dict(), strict=False)
        features = shorter.forward_features(images)
        head = model.head if column == columns - 1 else supervised.classifiers[str(column)]
        total += beta * F.cross_entropy(head(features), labels)
        if alpha:
            logits = supervised.decoders[str(column)](features.permute(0, 2, 3, 1))
            total += alpha * F.binary_cross_entropy(logits.sigmoid(), pixels.clamp(0.01, 0.99))
    assert_close(result["loss"], total)
    assert_close(result["output"], model(images))
    terms = [f"bce_{stop.column}" for stop in task.stops if stop.alpha] + [f"ce_{stop.column}" for stop in task.stops]
    assert set(terms) == result.keys() - {"loss", "output"}


@pytest.mark.parametrize("memory", ["recompute", "exact", ("exact", "store", "recompute", "exact", "exact")])
def test_gradients_are_those_of_store(memory) -> None:
    """Intermediate outputs from the middle of the tape do not change a bit of the gradients."""
    grads = []
    for mode in ("store", memory):
        task = create_task(5, memory=mode, drop_path_rate=0.3)
        torch.manual_seed(2)
        task(*batch())["loss"].backward()
        assert all(parameter.grad is not None for parameter in task.parameters())
        grads.append([parameter.grad for parameter in task.parameters()])
    assert all(torch.equal(ours, store) for ours, store in zip(*grads, strict=True))


def test_inverted_columns_come_near() -> None:
    grads = []
    for mode in ("store", "invert"):
        task = create_task(5, memory=mode).double()
        images, labels = batch()
        task(images.double(), labels)["loss"].backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in task.parameters()]))
    assert not torch.equal(*grads)
    assert (grads[0] - grads[1]).norm() < 1e-6 * grads[0].norm()


def test_memory_under_a_budget() -> None:
    """The plan covers the step with the heads."""
    task = create_task(memory={"budget": "1GiB"})
    task(*batch())["loss"].backward()
    supervised = task.supervised()
    assert supervised.memory_plan.chosen.mode == "store"
    assert set(supervised.model.columns.memory) == {"store"}
    shapes = {name: value.shape for name, value in supervised.state_dict().items()}
    assert shapes == {name: value.shape for name, value in supervised.twin().state_dict().items()}


def test_image_is_the_target_after_mixup() -> None:
    mixup = Mixup(mixup_alpha=0.5, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    images, labels = batch(4)
    mixed, targets = mixup(images.clone(), labels)
    task = create_task(criterion=SoftTargetCrossEntropy())
    before = mixed.clone()
    result = task(mixed, targets)
    assert torch.equal(mixed, before)  # the clamp must not reach the input
    logits = task.supervised()(mixed).pixels[0]
    image = mixed * task.std + task.mean
    assert_close(result["bce_0"], F.binary_cross_entropy_with_logits(logits, image.clamp(0.01, 0.99)))
    assert task.image(mixed).min() >= 0.01
    assert task.image(mixed).max() <= 0.99


def test_heads_without_weight_are_not_built() -> None:
    task = create_task(4, config=SupervisionConfig(alpha=[0, 1, 0, 2], beta=[0, 0, 0.5, 1]))
    supervised = task.supervised()
    assert list(supervised.decoders) == ["1", "3"]
    assert list(supervised.classifiers) == ["2"]
    task(*batch())["loss"].backward()
    assert all(parameter.grad is not None for parameter in task.parameters())


def test_half_precision() -> None:
    task, data = create_task(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        result = task(*data)
    assert result["bce_0"].dtype == torch.float32
    assert_close(result["loss"], create_task()(*data)["loss"], rtol=2e-2, atol=2e-2)


def test_training_reduces_every_loss() -> None:
    task, (images, labels) = create_task(), batch(4, 32)
    task.supervised().model.columns.memory = "store"  # the same gradients for the least work
    images = F.interpolate(images[..., ::8, ::8], 32, mode="bilinear")  # smooth, so that a decoder can draw them
    optimizer = torch.optim.AdamW(task.parameters(), 3e-3)
    first = task(images, labels)
    for _ in range(30):
        optimizer.zero_grad()
        last = task(images, labels)
        last["loss"].backward()
        optimizer.step()
    for term in ("bce_0", "bce_1", "bce_2", "ce_0", "ce_3"):
        assert last[term] < first[term] - 0.01, term


# --------------------------------------------------------------------------------------- validation and deployment


def test_accuracy_of_every_head() -> None:
    task, (images, labels) = create_task(), batch(7)
    task.eval()
    supervised = task.supervised()
    evaluator = HeadsEvaluator(supervised.stops)
    for part in (slice(0, 4), slice(4, 7)):
        outputs = supervised(images[part])
        assert not outputs.pixels  # no decoder runs
        evaluator.update(outputs, labels[part])
    found = evaluator.compute()
    logits = supervised(images).logits
    for column, values in logits.items():
        suffix = "" if column == 3 else f"_{column}"
        assert found[f"top1{suffix}"] == pytest.approx(100 * (values.argmax(1) == labels).double().mean().item())
        assert found[f"loss{suffix}"] == pytest.approx(F.cross_entropy(values, labels).item(), rel=1e-5)
        assert found[f"top5{suffix}"] == 100
    assert list(found)[:3] == ["loss", "top1", "top5"]
    assert_close(task.get_eval_model()(images), logits[3])


def test_checkpoints_contain_only_the_model() -> None:
    task, data = create_task(), batch()
    task.setup_ema(decay=0.5)
    optimizer = torch.optim.SGD(task.parameters(), 0.1)
    task(*data)["loss"].backward()
    optimizer.step()
    task.update_ema(1)
    state, average = task.get_checkpoint_state(), task.get_checkpoint_state(ema=True)
    model = timm.create_model("test_revcol", num_classes=CLASSES)
    model.load_state_dict(state["state_dict"])  # strict: no heads in it
    assert_close(model(data[0]), task.get_eval_model()(data[0]))
    model.load_state_dict(average["state_dict_ema"])
    assert_close(model(data[0]), task.get_eval_model(ema=True)(data[0]))
    other = create_task()
    other.setup_ema()
    other.load_checkpoint_state(state["state_dict"], state["task_state"])
    other.load_checkpoint_state(average["state_dict_ema"], average["task_state_ema"], ema=True)
    assert torch.equal(other(*data)["loss"], task(*data)["loss"])
    for ours, theirs in zip(
        other.supervised(ema=True).parameters(), task.supervised(ema=True).parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_checkpoint_state(state["state_dict"], {})


def test_compiled_cells() -> None:
    torch.compiler.reset()
    task, data = create_task(2), batch()
    expected = task(*data)["loss"]
    assert task.compile(backend="aot_eager") is task.get_eval_model()
    assert_close(task(*data)["loss"], expected)
    torch.compiler.reset()


@pytest.mark.parametrize("coarse", [False, True])
def test_layer_decay_of_a_supervised_model(coarse: bool) -> None:
    """The groups are the model's, and the heads are in the group of its classifier."""
    task = create_task()
    supervised = task.supervised()
    inner = group_parameters(supervised.model, supervised.model.group_matcher(coarse), reverse=True)
    outer = group_parameters(supervised, supervised.group_matcher(coarse), reverse=True)
    for name, group in outer.items():
        assert group == inner[name.removeprefix("model.") if name.startswith("model.") else "head.fc.weight"]
    assert outer.keys() == dict(supervised.named_parameters()).keys()
    assert supervised.no_weight_decay() <= outer.keys()
