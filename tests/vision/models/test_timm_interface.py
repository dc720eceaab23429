"""The timm interface of RevCol models: the checks of timm's own tests, and extensions."""

from __future__ import annotations

import math
import pickle
import re
import runpy

import pytest
import timm
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import create_feature_extractor, get_graph_node_names
from timm.models import group_parameters
from torch.testing import assert_close
from typer.testing import CliRunner

import revnets
import vision
from revnets import NetSpec, SpecError
from revnets.memory.tracker import OpCounter
from tests.support.errors import raises_error
from tests.support.paths import ROOT
from vision.revcol import MODELS

NAMES = ("test_revcol", "test_revcol_huge", "test_revcol_vit")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def create(name: str, **options) -> vision.RevCol:
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 11, **options})


def images(model, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *model.default_cfg["input_size"])


def test_fast_initialization(name: str) -> None:
    model = create(name, init="fast")
    scales = [weight for key, weight in model.named_parameters() if key.endswith((".gain.weight", ".scale.gamma"))]
    assert len(scales) >= (model.spec.columns - 1) * 4
    assert all(weight.eq(1).all() for weight in scales)


def test_unknown_initialization() -> None:
    with raises_error(SpecError, code="unknown-choice", key="init", names=["slow", "paper", "fast"]):
        create("test_revcol", init="slow")


@torch.no_grad()
def test_inference_makes_no_copy() -> None:
    """From the stem to the classifier every tensor is a view or a result, and none of these operators copies."""
    model = create("test_revcol").eval()
    with OpCounter() as counter:
        model(images(model))
    copies = {"aten.clone", "aten.copy_", "aten._to_copy", "aten.contiguous", "aten.constant_pad_nd"}
    assert not copies & counter.ops.keys()
    assert counter.ops["aten.gelu_"] == sum(level.depth for level in model.spec.levels) * model.spec.columns


def test_who_looks_at_the_input_of_gelu_sees_it() -> None:
    model = create("test_revcol").eval()
    seen: dict[str, torch.Tensor] = {}
    mlp = model.columns.cells[0][0].function.blocks[0].mlp
    handle = mlp.fc1.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    with torch.no_grad():
        expected = model(images(model))
        assert torch.equal(seen["out"], mlp.fc1(seen["x"]))
        handle.remove()
    assert expected.shape == (2, 11)


def test_benchmark_of_inference() -> None:
    file = ROOT / "examples" / "benchmarks" / "inference.py"
    app = typer.Typer()
    app.command()(runpy.run_path(str(file))["main"])
    options = ["--size", "32", "--rounds", "1"]
    result = CliRunner().invoke(app, ["--models", "test_revcol,test_revcol_huge", *options])
    assert result.exit_code == 0, result.output
    rows = re.findall(r"│ (test_revcol\w*) +│ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │", result.output)
    assert [row[0] for row in rows] == ["test_revcol", "test_revcol_huge"]
    assert (rows[0][1], rows[0][4]) == ("0.34", "1.000")
    wrong = CliRunner().invoke(app, ["--models", "revcol_tinny", *options])
    assert wrong.exit_code == 2
    assert "Did you mean revcol_tiny?" in " ".join(wrong.output.replace("│", " ").split())


# ----------------------------------------------------------------------------- as in timm's own tests of every model


@torch.no_grad()
def test_forward_and_default_cfg(name: str) -> None:
    model = timm.create_model(name).eval()
    cfg, x = model.default_cfg, images(model)
    assert model(x).shape == (2, cfg["num_classes"])
    assert model(x).isfinite().all()
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, *cfg["pool_size"])
    assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= model.state_dict().keys()
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    assert model.pretrained_cfg is cfg
    model.reset_classifier(0)
    assert_close(model(x), model.head.norm(features.mean((2, 3), keepdim=True)).flatten(1))
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    model.reset_classifier(5, "max")
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("memory", ["exact", "store"])
def test_backward_reaches_every_parameter(name: str, memory: str) -> None:
    model = create(name, num_classes=42, memory=memory)
    out = model(images(model))
    out.mean().backward()
    assert out.shape[-1] == 42
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_features_only(name: str) -> None:
    features = create(name, features_only=True, num_classes=1000).eval()
    reductions = [16] * 4 if "vit" in name else [4, 8, 16, 32]
    assert features.feature_info.reduction() == reductions
    x = images(features, 1)
    outs = features(x)
    assert [out.shape for out in outs] == [
        (1, channels, 96 // reduction, 96 // reduction)
        for channels, reduction in zip(features.feature_info.channels(), reductions, strict=True)
    ]
    columns, stem = features.model.columns, features.model.stem
    for out, level in zip(outs, columns(stem(x)), strict=True):
        assert torch.equal(out, level.permute(0, 3, 1, 2))


def test_pruned_features_are_those_of_the_whole_model(name: str) -> None:
    model, features = create(name), create(name, features_only=True, out_indices=(0, -2))
    missing = features.model.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    last = model.spec.columns - 1
    assert {key.rpartition(".function")[0] for key in missing.unexpected_keys if "function" in key} == {
        f"columns.cells.{last}.3"
    }
    x = images(model)
    outs = features(x)
    for out, level in zip(outs, model.forward_intermediates(x, indices=[0, 2], intermediates_only=True), strict=True):
        assert_close(out, level)
    sum(out.square().sum() for out in outs).backward()
    assert all(parameter.grad is not None for parameter in features.parameters())
    assert features.feature_info.channels() == [model.spec.levels[0].dim, model.spec.levels[2].dim]


@pytest.mark.parametrize("index", range(4))
def test_every_trainable_parameter_of_a_pruned_model_gets_a_gradient(name: str, index: int) -> None:
    """DDP requires it. Cells of earlier columns may not contribute to any remaining level."""
    features = create(name, features_only=True, out_indices=(index,)).train()
    sum(out.square().sum() for out in features(images(features.model))).backward()
    for parameter in features.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
    frozen = sum(not parameter.requires_grad for parameter in features.parameters())
    assert bool(frozen) == (index < 2 and name != "test_revcol_huge")  # level 0 of H reads the top level


@pytest.mark.parametrize("classes", [0, 5])
def test_a_pruned_model_reports_its_remaining_levels(name: str, classes: int) -> None:
    model = create(name).eval()
    x = images(model)
    whole = model.forward_intermediates(x, intermediates_only=True)
    assert model.prune_intermediate_layers([1]) == [1]
    for ours, theirs in zip(model.forward_intermediates(x, intermediates_only=True), whole[:2], strict=True):
        assert torch.equal(ours, theirs)
    if classes:
        model.reset_classifier(classes, "avg")
    shapes = {key: (value.shape, value.requires_grad) for key, value in model.named_parameters()}
    assert {key: (value.shape, value.requires_grad) for key, value in model.twin().named_parameters()} == shapes
    assert model.prune_intermediate_layers([-2]) == [0]
    assert len(model.forward_intermediates(x, intermediates_only=True)) == 1


@torch.no_grad()
def test_forward_intermediates(name: str) -> None:
    model = create(name).eval()
    x = images(model)
    final, levels = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(final, levels[-1])
    _, (last,) = model.forward_intermediates(x, indices=1, output_fmt="NHWC")
    assert torch.equal(last.permute(0, 3, 1, 2), final)
    early, some = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert torch.equal(early, levels[1])
    assert all(torch.equal(a, b) for a, b in zip(some, levels[:2], strict=True))
    with raises_error(ValueError, code="unknown-choice", key="output_fmt", names=["'NLC'", "NCHW or NHWC"]):
        model.forward_intermediates(x, output_fmt="NLC")


def test_feature_extraction_by_fx(name: str) -> None:
    model = create(name).eval()
    _, nodes = get_graph_node_names(model)
    extractor = create_feature_extractor(model, {nodes[-1]: "out"})
    x = images(model)
    out = extractor(x)["out"]
    assert_close(out, model(x))
    out.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------ the arguments


def test_arguments_of_every_timm_model(name: str) -> None:
    model = create(name, in_chans=5, num_classes=3, global_pool="max", drop_rate=0.25, drop_path_rate=0.3)
    assert model(torch.randn(2, 5, 96, 96)).shape == (2, 3)
    assert (model.in_chans, model.num_classes, model.global_pool) == (5, 3, "max")
    assert model.head.drop.p == 0.25
    total = sum(level.depth for level in model.spec.levels)
    for column in model.columns.cells:
        rates = [block.drop_path.rate for cell in column for block in cell.function.blocks]
        assert rates == pytest.approx([0.3 * index / (total - 1) for index in range(total)])
    assert create(name, dtype=torch.bfloat16).head.fc.weight.dtype == torch.bfloat16
    assert {parameter.device.type for parameter in create(name, device="meta").parameters()} == {"meta"}


def test_a_small_first_classifier_for_fine_tuning() -> None:
    model = create("test_revcol", head_init_scale=1e-3)
    assert model.head.fc.weight.detach().std().item() == pytest.approx(0.02e-3, rel=0.2)
    model.reset_classifier(7)
    assert model.head.fc.weight.detach().std().item() == pytest.approx(0.02e-3, rel=0.2)


def test_kernel_size_dims_and_depths() -> None:
    model = create("test_revcol", kernel_size=5, dims=(4, 6, 10, 12), depths=(0, 1, 0, 2), columns=2)
    kernels = {m.kernel_size for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1}
    assert kernels == {(5, 5)}
    assert [info["num_chs"] for info in model.feature_info] == [4, 6, 10, 12]
    assert [len(cell.function.blocks) for cell in model.columns.cells[1]] == [0, 1, 0, 2]
    with raises_error(ValueError, code="wrong-length", key="dims", names=["[4, 6]", "4 values"]):
        create("test_revcol", dims=(4, 6))
    for name, options, code, key, names in (
        ("test_revcol_vit", {"kernel_size": 5}, "unknown-key", "levels.0.kernel_size", "5"),
        ("test_revcol", {"img_size": 64}, "unknown-key", "stem.img_size", "64"),
        ("test_revcol", {"kernel_size": 4}, "invalid-value", "levels.0", "kernel_size 4"),
        ("test_revcol", {"columns": 0}, "out-of-range", "columns", ["0", "at least 1"]),
        ("test_revcol", {"memory": "exat"}, "unknown-choice", "memory", "Did you mean exact?"),
    ):
        with raises_error(code=code, source=name, key=key, names=names):
            create(name, **options)


def test_size_of_images_of_the_isotropic_models() -> None:
    small, large = create("test_revcol_vit"), create("test_revcol_vit", img_size=128, patch_size=16)
    assert large.stem.pos_embed.shape == (8, 8, 16)
    with pytest.raises(RuntimeError, match="size mismatch"):
        large.load_state_dict(small.state_dict())
    large.load_state_dict(vision.revcol.fit_positions(small.state_dict(), large))
    x = torch.randn(1, 3, 128, 128)
    assert_close(small.eval()(x), large.eval()(x))  # either way the same interpolation
    assert small(torch.randn(1, 3, 97, 50)).shape == (1, 11)
    with raises_error(code="not-divisible", source="test_revcol_vit", names=["100", "patch 16"]):
        create("test_revcol_vit", img_size=100)


@settings(max_examples=15)
@given(st.sampled_from(NAMES), st.integers(1, 7), st.integers(16, 79), st.integers(16, 79))
def test_any_number_of_columns_and_any_side(name: str, columns: int, height: int, width: int) -> None:
    model = create(name, columns=columns, drop_path_rate=0.2)
    x = torch.randn(1, 3, height, width)
    grads = []
    for memory in ("exact", "store"):
        model.columns.memory = memory
        torch.manual_seed(1)
        features = model.forward_features(x)
        grads.append(torch.autograd.grad(model.forward_head(features).square().sum(), list(model.parameters())))
    for info, level in zip(model.feature_info, model.forward_intermediates(x)[1], strict=True):
        patch = 16 if "vit" in name else 4
        expected = tuple(math.ceil(side // patch / (info["reduction"] // patch)) for side in (height, width))
        assert level.shape[2:] == expected
    assert all(torch.equal(exact, store) for exact, store in zip(*grads, strict=True))


@pytest.mark.parametrize("memory", ["recompute", "exact", ("exact", "store", "recompute")])
def test_memory_modes_have_the_gradients_of_store(name: str, memory) -> None:
    grads = []
    for mode in ("store", memory):
        model = create(name, columns=3, memory=mode, drop_path_rate=0.3, drop_rate=0.1)
        torch.manual_seed(2)
        model(images(model)).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert set(model.columns.memory) == ({memory} if isinstance(memory, str) else set(memory))
    assert all(torch.equal(ours, store) for ours, store in zip(*grads, strict=True))


def test_memory_under_a_budget() -> None:
    model = create("test_revcol", memory={"budget": "1GiB"})
    model(images(model)).sum().backward()
    assert model.memory_plan.chosen.mode == "store"
    twin = model.twin()
    assert {key: value.shape for key, value in twin.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_grad_checkpointing_is_a_memory_mode(name: str) -> None:
    model = create(name)
    assert set(model.columns.memory) == {"exact"}
    model.set_grad_checkpointing(False)
    assert set(model.columns.memory) == {"store"}
    model.set_grad_checkpointing()
    assert set(model.columns.memory) == {"exact"}
    model.columns.memory = "recompute"
    model.set_grad_checkpointing()
    assert set(model.columns.memory) == {"recompute"}


# ------------------------------------------------------------------------------------------------------- elsewhere


@torch.no_grad()
def test_yaml_and_registry_are_one_model(name: str) -> None:
    model = timm.create_model(name).eval()
    net = revnets.build(MODELS / f"{name}.yaml").eval()
    net.load_state_dict(model.state_dict())  # strict
    x = images(model)
    assert_close(net(x), model(x))


@torch.no_grad()
def test_copies(name: str) -> None:
    model = create(name).eval()
    x = images(model)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    other = create(name, columns=model.spec.columns).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_the_yaml_of_a_model_is_checked_once(monkeypatch):
    checked = []
    original = NetSpec._check_residuals
    monkeypatch.setattr(NetSpec, "_check_residuals", lambda spec: checked.append(spec) or original(spec))
    with torch.device("meta"):
        create("test_revcol", columns=2)
    assert [spec.columns for spec in checked] == [2]


def test_weights_can_be_loaded_without_the_registry(tmp_path):
    model = create("test_revcol", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    other = vision.RevCol(model.spec, num_classes=5)
    other.load_pretrained(str(tmp_path / "weights.pth"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_model_of_the_registry_is_a_revcol():
    assert type(create("test_revcol")) is vision.RevCol


# ------------------------------------------------------------------------------------------------ columns that run down


def down() -> vision.RevCol:
    """A model whose last column runs from its top level down."""
    torch.manual_seed(0)
    return create("test_revcol", columns={"up": 2, "down": 1})


def test_features_of_a_last_column_that_runs_down() -> None:
    model = down().eval()
    x = images(model)
    with torch.no_grad():
        states = model.columns.inverse(model.columns(model.stem(x)), model.stem(x))[0]
        for indices in ([3], [2], [1, 3], [0, 2], 2):
            expected = [states[index].permute(0, 3, 1, 2) for index in (indices if indices != 2 else [2, 3])]
            for stop_early in (False, True):
                found = model.forward_intermediates(x, indices, stop_early=stop_early, intermediates_only=True)
                assert_close(found, expected, rtol=0, atol=0)
        assert_close(model.forward_features(x), states[3].permute(0, 3, 1, 2), rtol=0, atol=0)


def test_stopping_early_omits_the_levels_below() -> None:
    model = down().eval()
    called: list[int] = []
    for level, cell in enumerate(model.columns.cells[2]):
        cell.register_forward_hook(lambda *_, level=level: called.append(level))
    with torch.no_grad():
        model.forward_intermediates(images(model), [2], stop_early=True)
    assert called == [3, 2]


@pytest.mark.parametrize("indices", [[3], [1, 2]])
def test_unneeded_cells_are_frozen_if_the_last_column_runs_down(indices: list[int]) -> None:
    model = down()
    assert model.prune_intermediate_layers(indices) == indices
    found = model.forward_intermediates(images(model), indices, intermediates_only=True)
    sum(feature.square().sum() for feature in found).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert not any(parameter.requires_grad for parameter in model.columns.cells[2][0].parameters())


def test_depth_in_a_column_that_runs_down_counts_from_its_top() -> None:
    model = down()
    groups = {name: group for group, names in group_parameters(model, model.group_matcher()).items() for name in names}
    first = [groups[f"columns.cells.2.{level}.function.blocks.0.dwconv.weight"] for level in range(4)]
    assert first == sorted(first, reverse=True)
    assert len(set(first)) == 4
