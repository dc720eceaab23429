"""make_reversible and undo_reversible: gradients, names, hooks, arguments and outputs of blocks."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import revnets
from revnets.engine.errors import ArgumentError
from revnets.pretrained.rewired_sequence import rewired_sequences
from tests.support.residual_networks import (
    DEPTH,
    DIM,
    ResidualNetwork,
    TupleBlock,
    assert_exact_is_store,
    assert_same_tensors,
    inputs,
    training_step,
)

TAPED = ("recompute", "exact")


def by_hand(model: ResidualNetwork, x: torch.Tensor, b: float) -> torch.Tensor:
    """Compute the rewired network as a loop over the original blocks."""
    before = now = model.stem(x)
    for layer in model.layers:
        before, now = now, layer(now) - b * now + b * before
    return model.head(now.mean(1))


@pytest.mark.parametrize("b", [0.01, 0.3, 1.0])
def test_output_equals_the_recursion(b):
    model = ResidualNetwork().eval()
    expected = by_hand(model, inputs(), b)
    torch.testing.assert_close(revnets.make_reversible(model, b)(inputs()), expected)


def test_gradients_equal_the_recursion():
    model = ResidualNetwork(dropout=0.0)
    by_hand(model, inputs(), 0.3).square().sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    actual = training_step(revnets.make_reversible(model, 0.3), inputs(), memory="exact")[1:]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("b", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("memory", TAPED)
def test_gradients_equal_store_bit_for_bit(memory, b):
    model = revnets.make_reversible(ResidualNetwork(depth=11), b)
    expected = training_step(model, inputs(), memory="store")
    assert_same_tensors(training_step(model, inputs(), memory=memory), expected)


@pytest.mark.parametrize("memory", TAPED)
def test_gradients_reach_arguments_of_blocks(memory):
    model = revnets.make_reversible(ResidualNetwork())
    grads = []
    for mode in ("store", memory):
        revnets.find_columns(model).memory = mode
        shifts = torch.linspace(-1, 1, DEPTH * DIM).view(DEPTH, DIM).requires_grad_()
        torch.manual_seed(1)
        model(inputs(), shifts).sum().backward()
        grads.append(shifts.grad)
    assert torch.equal(*grads)
    assert grads[0].abs().min() > 0


def test_gradients_under_autocast():
    model = revnets.make_reversible(ResidualNetwork())
    with torch.autocast("cpu", torch.bfloat16):
        expected = training_step(model, inputs(), memory="store")
        assert_same_tensors(training_step(model, inputs(), memory="exact"), expected)


def test_gradients_of_frozen_blocks():
    model = revnets.make_reversible(ResidualNetwork())
    model.stem.requires_grad_(False)
    model.layers[:4].requires_grad_(False)
    expected = training_step(model, inputs(), memory="store")
    assert sum(grad is None for grad in expected) == 2 + 4 * 6
    assert_same_tensors(training_step(model, inputs(), memory="exact"), expected)


def test_exact_saves_no_tensors_of_blocks():
    model = revnets.make_reversible(ResidualNetwork(depth=23), 0.5)

    def saved(mode: str) -> int:
        revnets.find_columns(model).memory = mode
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(inputs())
        return count

    assert saved("store") - saved("exact") >= 23 * 5  # all tensors that a block saves


def test_invert_warns_of_drift():
    model = revnets.make_reversible(ResidualNetwork(depth=11), 0.1, memory="invert")
    with pytest.warns(revnets.DriftWarning):
        model(inputs())


def test_names_and_weights_do_not_change():
    model = ResidualNetwork()
    before = {name: weight.data_ptr() for name, weight in model.state_dict().items()}
    assert revnets.make_reversible(model) is model
    assert {name: weight.data_ptr() for name, weight in model.state_dict().items()} == before
    assert [name for name, _ in model.named_modules()] == [name for name, _ in ResidualNetwork().named_modules()]


def test_undo_restores_the_original_network():
    model = ResidualNetwork().eval()
    expected = model(inputs())
    revnets.undo_reversible(revnets.make_reversible(model, 0.5, learn_blend=True))
    assert torch.equal(model(inputs()), expected)
    assert list(model.state_dict()) == list(ResidualNetwork().state_dict())
    assert not rewired_sequences(model)


@pytest.mark.parametrize("steps", [0, 1])
def test_undo_removes_a_budget(steps):
    model = revnets.make_reversible(ResidualNetwork(), memory={"budget": "1GiB"})
    for _ in range(steps):
        model(inputs()).sum().backward()
    revnets.undo_reversible(model)
    model(inputs()).sum().backward()
    assert "memory_plan" not in vars(model)


def test_undo_keeps_trained_weights():
    model = revnets.make_reversible(ResidualNetwork())
    training_step(model, inputs(), memory="exact")
    torch.optim.SGD(model.parameters(), 0.1).step()
    trained = copy.deepcopy(model.state_dict())
    assert_same_tensors(list(revnets.undo_reversible(model).state_dict().values()), list(trained.values()))


def test_other_outputs_of_blocks_have_gradients():
    grads = []
    model = revnets.make_reversible(ResidualNetwork(block=TupleBlock, dropout=0.0))
    for mode in ("store", "exact"):
        revnets.find_columns(model).memory = mode
        model.zero_grad()
        x, total = model.stem(inputs()), 0
        for layer in model.layers:
            x, mean = layer(x)
            total = total + mean.sum()
        (total + x.square().sum()).backward()
        grads.append([parameter.grad for parameter in model.layers.parameters()])
    assert_same_tensors(*grads)


def test_hooks_of_blocks_run_once_per_forward():
    model = revnets.make_reversible(ResidualNetwork())
    calls = []
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    training_step(model, inputs(), memory="exact")
    assert calls == list(range(DEPTH))


def test_states_between_blocks_can_be_read():
    model = revnets.make_reversible(ResidualNetwork())

    def loss() -> torch.Tensor:
        states = [model.stem(inputs())]
        for layer in model.layers:
            states.append(layer(states[-1]))
        return sum(state.square().sum() for state in states[1:])

    assert_exact_is_store(model, loss)


def test_interrupted_forward_has_gradients():
    model = revnets.make_reversible(ResidualNetwork())

    def loss() -> torch.Tensor:
        x = model.stem(inputs())
        for layer in model.layers[:4]:
            x = layer(x)
        return x.square().sum()

    assert_exact_is_store(model, loss)
    training_step(model, inputs(), memory="exact")  # the next forward pass starts again


def test_two_forwards_before_one_backward():
    model = revnets.make_reversible(ResidualNetwork(dropout=0.0))
    assert_exact_is_store(model, lambda: model(inputs(0)).sum() * model(inputs(1)).sum())


def test_threads_have_separate_passes():
    model = revnets.make_reversible(ResidualNetwork().eval())
    expected = [model(inputs(seed)) for seed in range(4)]
    results: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(4)

    def run(seed: int) -> None:
        barrier.wait()
        for _ in range(20):
            results[seed] = model(inputs(seed))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same_tensors([results[seed] for seed in range(4)], expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_reversible_and_independent(copied):
    model = revnets.make_reversible(ResidualNetwork())
    other = copied(model)
    expected = training_step(model, inputs(), memory="exact")
    with torch.no_grad():
        model.layers[2].up.weight.zero_()
    assert_same_tensors(training_step(other, inputs(), memory="exact"), expected)
    (sequence,) = rewired_sequences(other)
    assert [cell.function for cell in sequence.block_cells] == list(other.layers)


def test_copy_during_a_pass_has_no_pass():
    model = revnets.make_reversible(ResidualNetwork())
    model.layers[0](model.stem(inputs()))
    (sequence,) = rewired_sequences(copy.deepcopy(model))
    assert not sequence._passes


def test_gradients_of_learned_blends_equal_store():
    model = revnets.make_reversible(ResidualNetwork(), 0.3, learn_blend=True)
    names = [name for name, _ in model.named_parameters() if "blend" in name]
    assert names == [f"layers.{index}.blend.weight" for index in range(1, DEPTH)]
    expected = training_step(model, inputs(), memory="store")
    assert_same_tensors(training_step(model, inputs(), memory="exact"), expected)
    assert all(model.get_parameter(name).grad.abs() > 0 for name in names)


def test_blocks_wrapped_by_another_tool_keep_the_wrapper():
    model = ResidualNetwork().eval()
    layer, calls = model.layers[1], []
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    revnets.make_reversible(model)(inputs())
    revnets.undo_reversible(model)(inputs())
    assert len(calls) == 2


def test_gradients_of_compiled_blocks_equal_store():
    model = revnets.make_reversible(ResidualNetwork(depth=2, dropout=0.0))
    (sequence,) = rewired_sequences(model)
    sequence.compile(backend="aot_eager")
    expected = training_step(model, inputs(), memory="store")
    assert_same_tensors(training_step(model, inputs(), memory="exact"), expected)
    assert "forward" not in vars(revnets.undo_reversible(model).layers[1])


def test_batch_norm_statistics_change_once_per_step():
    blocks = [nn.Sequential(nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5)) for _ in range(4)]
    model = nn.ModuleDict({"layers": nn.Sequential(*blocks)})
    revnets.make_reversible(model, 0.3, blocks="layers")
    model["layers"](torch.randn(2, 5, 7, 7, requires_grad=True)).sum().backward()
    assert [int(block[1].num_batches_tracked) for block in blocks] == [1] * 4


# ------------------------------------------------------------------------------------------------------- invalid input


@pytest.mark.parametrize("blend", [0, -0.1, 1.5, float("nan"), "0.1", True])
def test_blends_out_of_range_raise(blend):
    model = ResidualNetwork()
    with pytest.raises(ArgumentError) as error:
        revnets.make_reversible(model, blend)
    assert (error.value.key, error.value.code) == ("blend", "out-of-range")
    assert not rewired_sequences(model)


@pytest.mark.parametrize(
    ("options", "key", "code"),
    [
        ({"rule": "euler"}, "rule", "unknown-choice"),
        ({"rule": "bdia", "learn_blend": True}, "learn_blend", "conflicting-values"),
        ({"memory": "all"}, "memory", "unknown-choice"),
        ({"memory": {"budget": "much"}}, "memory", "invalid-value"),
        ({"memory": {"bytes": 5}}, "memory", "invalid-value"),
        ({"memory": 5}, "memory", "invalid-value"),
        ({"blocks": "tower"}, "blocks", "unknown-choice"),
        ({"blocks": "stem"}, "blocks", "no-blocks"),
        ({"blocks": []}, "blocks", "wrong-type"),
        ({"blocks": ["layers", "layers"]}, "blocks", "unsupported-block"),
    ],
)
def test_invalid_arguments_raise(options, key, code):
    model = ResidualNetwork()
    with pytest.raises(ArgumentError) as error:
        revnets.make_reversible(model, **options)
    assert (error.value.key, error.value.code) == (key, code)
    assert not rewired_sequences(model)
    assert list(model.state_dict()) == list(ResidualNetwork().state_dict())


def test_rewiring_twice_raises():
    model = revnets.make_reversible(ResidualNetwork())
    with pytest.raises(ArgumentError) as error:
        revnets.make_reversible(model)
    assert error.value.code == "conflicting-values"


def test_undo_without_rewiring_raises():
    with pytest.raises(ArgumentError) as error:
        revnets.undo_reversible(ResidualNetwork())
    assert (error.value.key, error.value.code) == ("model", "no-columns")


def test_skipped_block_raises():
    model = revnets.make_reversible(ResidualNetwork())
    x = model.layers[0](model.stem(inputs()))
    with pytest.raises(ArgumentError) as error:
        model.layers[2](x)
    assert (error.value.key, error.value.code) == ("layers.2", "unsupported-block")


def test_state_changed_between_blocks_raises():
    model = revnets.make_reversible(ResidualNetwork())
    x = model.layers[0](model.stem(inputs()))
    with pytest.raises(ArgumentError) as error:
        model.layers[1](x + 1)
    assert (error.value.key, error.value.code) == ("layers.1", "unsupported-block")


def test_block_that_changes_the_shape_raises():
    model = nn.ModuleDict(
        {"layers": nn.Sequential(*(nn.Sequential(nn.MaxPool1d(2), nn.Linear(6, 6)) for _ in range(2)))}
    )
    revnets.make_reversible(model, blocks="layers")
    with pytest.raises(ArgumentError) as error:
        model["layers"](torch.randn(2, 5, 12))
    assert error.value.code == "shape-mismatch"


def test_gradient_checkpointing_of_timm_stays_off():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32, embed_dim=24, num_heads=3, num_classes=5)
    model.set_grad_checkpointing()
    with pytest.warns(UserWarning, match="checkpointing"):
        revnets.make_reversible(model)
    assert not model.grad_checkpointing
    with pytest.warns(UserWarning, match="checkpointing"):
        model.set_grad_checkpointing()
    assert not model.grad_checkpointing
    revnets.undo_reversible(model).set_grad_checkpointing()
    assert model.grad_checkpointing
