"""Recomputation of activations in backward."""

import torch
from torch import nn

from vision.models.recomputation import recomputed


def head():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.GELU(), nn.Dropout(0.3), nn.Linear(7, 3))


def gradients(module, run, passes=1):
    torch.manual_seed(1)
    loss = run(module, torch.randn(11, 5)).square().sum()
    return [torch.autograd.grad(loss, list(module.parameters()), retain_graph=True) for _ in range(passes)]


def with_dropout(module, x):
    return recomputed(module, x, draws=True)


def test_every_backward_has_the_gradients_of_a_plain_call():
    (expected,) = gradients(head(), lambda module, x: module(x))
    for found in gradients(head(), with_dropout, passes=3):
        assert all(torch.equal(ours, plain) for ours, plain in zip(found, expected, strict=True))


def test_running_statistics_are_updated_once():
    plain, module = head(), head()
    gradients(plain, lambda each, x: each(x))
    gradients(module, with_dropout, passes=2)
    for name, statistic in plain[1].named_buffers():
        assert torch.equal(statistic, module[1].get_buffer(name)), name


def test_statistics_survive_an_overflow():
    module = head()
    module[0].weight.data.fill_(1e30)
    before = {name: statistic.clone() for name, statistic in module[1].named_buffers()}
    with torch.no_grad():
        recomputed(module, torch.full((2, 5), 1e30))
    after_forward = {name: statistic.clone() for name, statistic in module[1].named_buffers()}
    module[1].load_state_dict(module[1].state_dict() | before)
    loss = recomputed(module, torch.full((2, 5), 1e30)).sum()
    loss.backward()
    for name, statistic in module[1].named_buffers():
        torch.testing.assert_close(statistic, after_forward[name], rtol=0, atol=0, equal_nan=True)
