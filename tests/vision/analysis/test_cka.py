"""CKA: the estimator compared with its definition, known identities, and the CKA of a network's states."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from revnets import build
from revnets.engine.graph import STEM
from revnets.memory.tracker import MemoryTracker
from tests.support.errors import raises_error
from vision.analysis import cka as module
from vision.analysis.cka import cka, gram, hsic, similarity, similarity_rows


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return two correlated Gram matrices."""
    x = drawn(n, 3, seed=seed)
    return gram(x), gram(torch.cat([x[:, :1] ** 2, drawn(n, 2, seed=seed + 1)], dim=1))


def reference(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """HSIC as the inner product of U-centered matrices (Székely and Rizzo 2014)."""

    def centered(a: np.ndarray) -> np.ndarray:
        n = len(a)
        a = a - np.diag(np.diag(a))
        sums = a.sum(0)
        a = a - sums[:, None] / (n - 2) - sums[None] / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
        return a - np.diag(np.diag(a))

    n = len(k)
    return float((centered(k) * centered(l)).sum() / (n * (n - 3)))


@pytest.mark.parametrize("n", [4, 5, 7])
def test_hsic_is_the_u_statistic(n: int) -> None:
    """The mean of K_ij (L_ij + L_qr - 2 L_iq) over all ordered quadruples of different samples (Song et al. 2012)."""
    k, l = related(n)  # noqa: E741
    quadruples = list(permutations(range(n), 4))
    brute = sum(float(k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])) for i, j, q, r in quadruples) / len(quadruples)
    assert abs(brute) > 0.01
    assert float(hsic(k, l)) == pytest.approx(brute, rel=1e-10)


def test_hsic_agrees_with_u_centering() -> None:
    k, l = related(101)  # noqa: E741
    assert float(hsic(k, l)) == pytest.approx(reference(k.numpy(), l.numpy()), rel=1e-10)
    assert float(hsic(k, k)) == pytest.approx(reference(k.numpy(), k.numpy()), rel=1e-10)


def test_batches_have_no_bias() -> None:
    """The mean over all batches of 5 out of 8 samples is the estimate from all 8; with the biased one it is not."""
    k, l = related(8)  # noqa: E741
    batches = [list(batch) for batch in combinations(range(8), 5)]
    mean = sum(float(hsic(k[batch][:, batch], l[batch][:, batch])) for batch in batches) / len(batches)
    assert mean == pytest.approx(float(hsic(k, l)), rel=1e-10)


def test_identities() -> None:
    x, y = drawn(53, 17), drawn(53, 11, seed=1)
    y = y + x[:, :11]
    k, found = gram(x), float(cka(gram(x), gram(y)))
    assert float(cka(k, k)) == pytest.approx(1, rel=1e-12)
    assert 0.1 < found < 0.9
    rotation = torch.linalg.qr(drawn(17, 17, seed=2))[0]
    assert float(cka(gram(x @ rotation), gram(y))) == pytest.approx(found, rel=1e-10)
    assert float(cka(gram(-3.7 * x), gram(y))) == pytest.approx(found, rel=1e-10)
    assert float(cka(gram(x + drawn(17, seed=3)), gram(y))) == pytest.approx(found, rel=1e-10)
    stretched = x * torch.linspace(0.1, 10, 17, dtype=torch.float64)  # not isotropic, so no identity
    assert float(cka(gram(stretched), gram(y))) != pytest.approx(found, rel=1e-2)
    order = torch.randperm(53, generator=torch.Generator().manual_seed(0))
    assert float(cka(gram(x[order]), gram(y[order]))) == pytest.approx(found, rel=1e-10)


def test_independent_data_have_a_mean_cka_near_0() -> None:
    """Also for few samples of many features, for which the biased estimator is near 1."""
    found = [float(cka(gram(drawn(16, 200, seed=seed)), gram(drawn(16, 200, seed=1000 + seed)))) for seed in range(200)]
    assert abs(np.mean(found)) < 0.02
    assert np.std(found) < 0.2


def test_the_gram_matrix_is_float64_for_any_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    x = (1e3 + drawn(7, 5, 3, 2)).float()
    wanted = x.double().flatten(1) @ x.double().flatten(1).T
    for chunk in (1, 50, 10**6):
        monkeypatch.setattr(module, "CHUNK", chunk)
        kernel = gram(x)
        assert kernel.dtype == torch.float64
        torch.testing.assert_close(kernel, wanted, rtol=1e-13, atol=0)


@pytest.fixture
def net():
    spec = {
        "columns": 3,
        "stem": {"type": "patchify", "in_chans": 1, "patch": 2},
        "levels": [{"dim": dim, "depth": 1, "block": "convnext", "layer_scale": 0.5} for dim in (3, 5)],
        "head": {"type": "classifier", "num_classes": 3},
        "memory": "exact",
    }
    return build(spec).eval()


def batches_of(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(drawn(size, 1, 8, 8, seed=seed).float(), torch.arange(size) * 7 % 3) for seed, size in enumerate(sizes)]


def states_by_hand(net, images: Tensor) -> list[Tensor]:
    """All states, computed cell by cell without the engine."""
    stem, states = net.stem(images), []
    for node, cell in zip(net.columns.graph.nodes, net.columns.flat(), strict=True):
        state = cell.function(*(stem if read == STEM else states[read] for read in node.reads))
        states.append(state if node.residual is None else state + cell.gain() * states[node.residual])
    return states


@pytest.mark.parametrize("sizes", [(29,), (11, 13, 5)])
def test_similarity_of_a_network(net, sizes: tuple[int, ...]) -> None:
    """Compared with NumPy on stored features. Labels are one-hot plus a small value, as in the official code."""
    batches = batches_of(*sizes)
    sums = np.zeros((6, 3))
    own = np.zeros(2)
    for images, labels in batches:
        targets = [images.flatten(1).double().numpy(), np.eye(3)[labels.numpy()] + 1e-6]
        targets = [target @ target.T for target in targets]
        own += [reference(target, target) for target in targets]
        with torch.no_grad():
            states = states_by_hand(net, images)
        for index, state in enumerate(states):
            x = state.flatten(1).double().numpy()
            sums[index] += [reference(x @ x.T, other) for other in (x @ x.T, *targets)]
    wanted = (sums[:, 1:] / np.sqrt(sums[:, :1] * own)).reshape(3, 2, 2)
    found = similarity(net, net.columns, batches)
    assert found.samples == sum(sizes)
    np.testing.assert_allclose(found.images, wanted[..., 0], rtol=1e-4)
    np.testing.assert_allclose(found.labels, wanted[..., 1], rtol=1e-4, atol=1e-6)
    assert [(row["column"], row["level"]) for row in similarity_rows(found)] == [
        (column, level) for column in range(3) for level in range(2)
    ]
    assert similarity_rows(found)[3]["labels"] == float(found.labels[1, 1])


def test_no_features_outlive_their_batch(net) -> None:
    peaks = []
    for count in (1, 4):
        with MemoryTracker() as tracker:
            similarity(net, net.columns, batches_of(*[64] * count)[:count])
        peaks.append(tracker.peak)
        assert tracker.live < 64 * 1024  # all that is left are the results
    inputs = 64 * 64 * 4 * 3  # made before the first forward
    assert peaks[1] <= peaks[0] + 2 * inputs


def test_too_few_images_and_a_single_class_are_errors(net) -> None:
    few = similarity(net, net.columns, batches_of(3))
    assert few.samples == 0
    with raises_error(code="too-few-samples", key="--batch", names=["0 readable images", "needs 4"]):
        few.require_defined()
    images, labels = batches_of(9)[0]
    alike = similarity(net, net.columns, [(images, torch.zeros_like(labels))])
    assert alike.images.isfinite().all()
    with raises_error(code="too-few-samples", key="--batch", names=["9 images", "same class"]):
        alike.require_defined()


def test_states_of_a_column_that_runs_down_are_listed_by_level() -> None:
    torch.manual_seed(0)
    levels = [{"dim": 5, "depth": 1, "block": "convnext"}, {"dim": 7, "depth": 1, "block": "convnext"}]
    net = build({"columns": {"up": 1, "down": 1}, "stem": {"type": "patchify", "patch": 2}, "levels": levels}).eval()
    images, labels = drawn(6, 3, 8, 8).float(), torch.arange(6) % 2
    found = similarity(net, net.columns, [(images, labels)])
    with torch.no_grad():
        last = net(images)
    expected = [float(cka(gram(state), gram(images))) for state in last]
    assert found.images[1].tolist() == pytest.approx(expected, rel=1e-6)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)
