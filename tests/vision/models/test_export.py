"""RevCol models compiled, exported, traced and in ONNX, and the error of TorchScript."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.export import Dim
from torch.testing import assert_close

import vision

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
    ),
]
STRIDES = {"test_revcol": 32, "test_revcol_vit": 16}
"""Stride of the coarsest level, of which the sides of exported images are multiples."""


@pytest.fixture(scope="module", params=STRIDES)
def model(request: pytest.FixtureRequest) -> vision.RevCol:
    torch.manual_seed(0)
    model = timm.create_model(request.param, num_classes=11, columns=2, depths=(1, 1, 1, 1)).eval()
    for name, parameter in model.named_parameters():  # or the branches, scaled down by 1e-6, would not be seen
        if name.endswith("scale.gamma"):
            parameter.data.fill_(1.0)
    return model


def sizes(model: vision.RevCol) -> tuple[tuple[int, int], dict[int, Dim], list[tuple[int, int]]]:
    """Return the sides of an example, dynamic axes, and sides to test."""
    stride = STRIDES[model.pretrained_cfg["architecture"]]
    free = {0: Dim("batch", max=64), 2: stride * Dim("rows", max=16), 3: stride * Dim("columns", max=16)}
    return (2 * stride, 3 * stride), free, [(2 * stride, 3 * stride), (3 * stride, 2 * stride)]


@pytest.fixture(scope="module")
def program(model: vision.RevCol) -> torch.export.ExportedProgram:
    """For any batch size and sides, as `torch.onnx.export` does with a model."""
    example, free, _ = sizes(model)
    with torch.no_grad():
        return torch.export.export(model, (torch.randn(2, 3, *example),), dynamic_shapes=(free,))


@torch.no_grad()
def test_compiled(model: vision.RevCol) -> None:
    torch.compiler.reset()
    other = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in (2, 3):
        x = torch.randn(batch, 3, 64, 96)
        assert_close(other(x), model(x))


@torch.no_grad()
def test_traced(model: vision.RevCol) -> None:
    other = torch.jit.trace(model, (torch.randn(2, 3, 64, 96),))
    x = torch.randn(3, 3, 64, 96)
    assert_close(other(x), model(x))


@torch.no_grad()
def test_exported_for_any_batch_and_sides(model: vision.RevCol, program: torch.export.ExportedProgram) -> None:
    other = program.module()
    for batch, sides in zip((1, 3), sizes(model)[-1], strict=True):
        x = torch.randn(batch, 3, *sides)
        assert_close(other(x), model(x))


@torch.no_grad()
def test_an_example_of_the_native_size_exports_a_program_for_any_size() -> None:
    """Position embeddings need no interpolation there, which must not specialize the program."""
    model = timm.create_model("test_revcol_vit", num_classes=11, columns=2, depths=(1, 1, 1, 1)).eval()
    free = {0: Dim("batch"), 2: 16 * Dim("rows"), 3: 16 * Dim("columns")}
    other = torch.export.export(model, (torch.randn(2, 3, 96, 96),), dynamic_shapes=(free,)).module()
    for sides in ((96, 96), (64, 112)):
        x = torch.randn(3, 3, *sides)
        assert_close(other(x), model(x))


@torch.no_grad()
def test_onnx_for_any_batch_and_sides(model: vision.RevCol, program: torch.export.ExportedProgram) -> None:
    from onnx.reference import ReferenceEvaluator

    proto = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    other = ReferenceEvaluator(proto)
    for batch, sides in zip((1, 3), sizes(model)[-1], strict=True):
        x = torch.randn(batch, 3, *sides)
        (out,) = other.run(None, {proto.graph.input[0].name: x.numpy()})
        assert_close(torch.from_numpy(out), model(x), rtol=1e-4, atol=1e-5)


def test_scripting_raises_an_error_with_an_alternative() -> None:
    for features in (False, True):
        with pytest.raises(TypeError, match="TorchScript does not support"):
            torch.jit.script(timm.create_model("test_revcol", features_only=features))
