"""Deformable attention on maps with known values."""

import torch
import torch.nn.functional as F

from vision.detection.dino_detr.deformable_attention import DeformableAttention

SIZES = [(7, 11), (5, 3)]
DIM, HEADS = 6, 2


def identity_attention(points=3):
    """Attention with identity projections of values and output."""
    attention = DeformableAttention(DIM, HEADS, len(SIZES), points)
    with torch.no_grad():
        for linear in (attention.value, attention.output):
            linear.weight.copy_(torch.eye(DIM))
    return attention


def ramps():
    """Maps (1, S, C) whose value is x for even channels and y for odd ones, in fractions of the map."""
    parts = []
    for height, width in SIZES:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        parts.append(torch.stack([x, y], -1).reshape(1, -1, 2).repeat(1, 1, DIM // 2))
    return torch.cat(parts, 1)


def test_points_give_the_mean_of_the_values_around_them():
    attention = identity_attention()
    references = torch.tensor([[0.5, 0.5], [0.5, 0.51]])[None, :, None].repeat(1, 1, len(SIZES), 1)
    offsets = torch.tensor([0.5, -0.25])  # cells to the right and up, for all points
    with torch.no_grad():
        attention.offsets.bias.copy_(offsets.repeat(HEADS * len(SIZES) * 3))
        found = attention(torch.randn(1, 2, DIM), references, ramps(), SIZES)
    sides = torch.tensor([(width, height) for height, width in SIZES])
    expected = references[0, :, 0] + (offsets / sides).mean(0)
    torch.testing.assert_close(found[0], expected.repeat(1, DIM // 2))


def test_offsets_of_boxes_are_parts_of_their_sides():
    attention = identity_attention(points=2)
    boxes = torch.tensor([[0.5, 0.5, 0.3, 0.2]])[None, :, None].repeat(1, 1, len(SIZES), 1)
    with torch.no_grad():
        attention.offsets.bias.fill_(1.0)
        found = attention(torch.randn(1, 1, DIM), boxes, ramps(), SIZES)
    expected = torch.tensor([0.5 + 0.3 / 4, 0.5 + 0.2 / 4])  # one of two points, half of half a side away
    torch.testing.assert_close(found[0, 0], expected.repeat(DIM // 2))


def test_values_in_the_padding_do_not_count():
    attention, generator = identity_attention(), torch.Generator().manual_seed(0)
    queries = torch.randn(1, 5, DIM, generator=generator)
    references = torch.rand(1, 5, len(SIZES), 2, generator=generator)
    padded = torch.rand(1, ramps().shape[1], generator=generator) > 0.5
    garbage = torch.where(padded[..., None], torch.randn(1, 1, DIM, generator=generator), ramps())
    found = attention(queries, references, garbage, SIZES, padded)
    assert torch.equal(found, attention(queries, references, ramps(), SIZES, padded))


def test_initial_heads_sample_in_different_directions():
    attention = DeformableAttention(8, 4, 1, points=2)
    offsets = attention.offsets.bias.view(4, 1, 2, 2)
    torch.testing.assert_close(offsets[:, 0, 0], torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(offsets[:, :, 1], 2 * offsets[:, :, 0])


def attention_by_views(module, queries, references, features):
    """The same computation with views and transpositions."""
    batch, count, dim = queries.shape
    values = module.value(features)
    shape = batch, count, module.heads, module.levels, module.points
    offsets = module.offsets(queries).view(*shape, 2)
    weights = module.weights(queries).view(*shape[:3], -1).softmax(-1).view(shape)
    sides = offsets.new_tensor([(width, height) for height, width in SIZES])
    places = references[:, :, None, :, None] + offsets / sides[:, None]
    sampled = values.new_zeros(())
    for level, part in enumerate(values.split([height * width for height, width in SIZES], dim=1)):
        maps = part.transpose(1, 2).reshape(batch * module.heads, dim // module.heads, *SIZES[level])
        grid = (2 * places[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        weight = weights[:, :, :, level].transpose(1, 2).reshape(batch * module.heads, 1, count, module.points)
        sampled = sampled + (F.grid_sample(maps, grid, align_corners=False) * weight).sum(-1)
    return module.output(sampled.reshape(batch, dim, count).transpose(1, 2))


def test_rearrangements_are_views_and_transpositions():
    torch.manual_seed(0)
    module = DeformableAttention(DIM, HEADS, len(SIZES), 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    queries, references = torch.randn(2, 5, DIM), torch.rand(2, 5, len(SIZES), 2)
    features = torch.randn(2, sum(height * width for height, width in SIZES), DIM)
    results = []
    for attend in (lambda *given: module(*given, SIZES), lambda *given: attention_by_views(module, *given)):
        given = [tensor.clone().requires_grad_() for tensor in (queries, references, features)]
        output = attend(*given)
        results.append([output, *torch.autograd.grad(output.square().sum(), [*given, *module.parameters()])])
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))
