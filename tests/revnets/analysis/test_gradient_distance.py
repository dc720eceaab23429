from __future__ import annotations

import math

import pytest
import torch

from revnets.analysis.gradient_distance import distance, gradient_distance, ratio, same_bits


def test_distance_of_known_tensors():
    d = distance(torch.tensor([3.0, 4.0, 1.0]), torch.tensor([3.0, 0.0, 4.0]))
    assert (d.elements, d.norm, d.reference_norm, d.largest, d.reference_largest, d.equal) == (3, 5, 5, 4, 4, False)
    assert d.relative == 1


def test_complex_numbers_are_compared_by_real_and_imaginary_part():
    d = distance(torch.tensor([3 + 4j, 1j]), torch.tensor([0j, 1j]))
    assert (d.norm, d.reference_norm, d.largest) == (5, 1, 5)


def test_half_precision_is_compared_in_single():
    reference = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    tensor = reference + 2**-7  # one unit in the last place
    assert distance(tensor, reference).relative == 2**-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_same_bits_ignores_strides(dtype):
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    assert same_bits(tensor, tensor.clone())
    assert same_bits(tensor.t(), tensor.t().contiguous())  # strides do not matter
    other = tensor.clone()
    other[1, 2] = 0
    assert not same_bits(tensor, other)


def test_same_bits_and_equality_differ():
    nan = torch.tensor([math.nan])
    assert not torch.equal(nan, nan)
    assert same_bits(nan, nan.clone())
    assert torch.equal(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(3))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert same_bits(torch.tensor(1.0), torch.tensor(1.0))
    assert same_bits(torch.zeros(0), torch.zeros(0))


def test_gradients_are_compared_together_and_one_by_one():
    references = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, 4.0]), "unused": None}
    d = gradient_distance({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, 3.0]), "unused": None}, references)
    assert (d.relative, d.worst, d.worst_relative, d.equal) == (1 / 5, "b", 1 / 4, False)
    d = gradient_distance({name: tensor for name, tensor in references.items()}, references)
    assert (d.relative, d.worst, d.worst_relative, d.equal) == (0, "", 0, True)


def test_missing_gradient_means_zeros():
    reference = {"a": torch.ones(4), "b": torch.ones(4)}
    d = gradient_distance({"a": torch.ones(4), "b": None}, reference)
    assert (d.relative, d.worst, d.worst_relative) == (pytest.approx(0.5**0.5), "b", 1)
    d = gradient_distance({"a": torch.ones(4), "b": torch.zeros(4)}, {"a": torch.ones(4), "b": None})
    assert (d.relative, d.equal) == (0, True)


def test_gradient_of_rounding_errors_is_not_the_worst():
    references = {"weight": torch.ones(100), "bias": torch.full((100,), 1e-9)}
    gradients = {"weight": torch.ones(100) + 1e-3, "bias": torch.full((100,), -1e-9)}
    d = gradient_distance(gradients, references)
    assert d.worst == "weight"
    assert d.worst_relative == pytest.approx(1e-3, rel=1e-3)


def test_gradient_that_is_not_finite_is_the_worst():
    references = {name: torch.ones(3) for name in "abc"}
    gradients = {"a": torch.ones(3) * 100, "b": torch.tensor([1.0, math.nan, 1.0]), "c": torch.ones(3) * 2}
    d = gradient_distance(gradients, references)
    assert d.worst == "b"
    assert math.isnan(d.relative)


def test_negative_zero_is_a_difference_of_norm_zero():
    d = gradient_distance({"a": torch.tensor([-0.0])}, {"a": torch.tensor([0.0])})
    assert d == (0, "a", 0, False)


def test_sparse_gradients_are_compared_by_value():
    dense = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert gradient_distance({"a": dense.to_sparse()}, {"a": dense.to_sparse()}).equal
    assert gradient_distance({"a": 2 * dense.to_sparse()}, {"a": dense}).relative == 1


def test_ratio_of_zeros_is_zero():
    assert ratio(0, 0) == 0
    assert ratio(1, 0) == math.inf
    assert ratio(1, 4) == 0.25
