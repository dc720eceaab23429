"""Images alone and padded in a batch with larger images."""

import torch
from torch import nn

from vision.detection.dino_detr.deformable_transformer import DeformableDecoder, DeformableEncoder, DetectionHead
from vision.detection.dino_detr.padded_levels import FeatureProjection, sine_encoding
from vision.detection.dino_detr.proposal_selection import ProposalSelection

DIM, HEADS, CLASSES, QUERIES = 32, 2, 5, 13
CHANNELS, STRIDES = (3, 5), (8, 16)
SMALL, LARGE = (96, 64), (160, 192)


class Head(nn.Module):
    """The detector without its backbone and without norms over whole maps, which depend on the padding."""

    def __init__(self):
        super().__init__()
        self.projection = FeatureProjection(CHANNELS, DIM)
        for projection in (*self.projection.maps, self.projection.coarsest):
            projection[1] = nn.Identity()
        self.projection.coarsest[0] = nn.Conv2d(CHANNELS[-1], DIM, 2, 2)
        self.encoder = DeformableEncoder(DIM, 64, HEADS, 3, 2)
        self.proposals = ProposalSelection(DIM, CLASSES, QUERIES)
        self.decoder = DeformableDecoder(DIM, 64, HEADS, 3, 2)
        self.contents = nn.Embedding(QUERIES, DIM)
        self.heads = nn.ModuleList(DetectionHead(DIM, CLASSES) for _ in range(2))

    def forward(self, maps, padded):
        sequence = self.encoder(self.projection(maps, padded))
        proposals = self.proposals(sequence)
        queries = self.contents.weight.expand(len(maps[0]), -1, -1)
        return proposals, self.decoder(queries, proposals.boxes.detach(), sequence, list(self.heads))


def varied(model):
    """Perturb all weights, so that offsets, heads and queries depend on the image."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def batch_of_two():
    """Return maps of a large and a small image, with random values in the padding, and the padding mask."""
    maps = [
        torch.randn(2, channels, LARGE[0] // stride, LARGE[1] // stride)
        for channels, stride in zip(CHANNELS, STRIDES, strict=True)
    ]
    padded = torch.zeros(2, *LARGE, dtype=torch.bool)
    padded[1, SMALL[0] :] = True
    padded[1, :, SMALL[1] :] = True
    return maps, padded


def test_predictions_of_an_image_do_not_depend_on_its_padding():
    torch.manual_seed(0)
    model = varied(Head()).eval()
    maps, padded = batch_of_two()
    alone = [x[1:, :, : SMALL[0] // stride, : SMALL[1] // stride] for x, stride in zip(maps, STRIDES, strict=True)]
    with torch.no_grad():
        proposals, layers = model(maps, padded)
        expected_proposals, expected_layers = model(alone, None)
    for found, expected in zip([proposals, *layers], [expected_proposals, *expected_layers], strict=True):
        torch.testing.assert_close(found.scores[1:], expected.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.boxes[1:], expected.boxes, rtol=1e-4, atol=1e-5)


def test_a_mask_without_padding_changes_nothing():
    torch.manual_seed(0)
    model = varied(Head()).eval()
    maps, padded = batch_of_two()
    with torch.no_grad():
        masked, plain = model(maps, torch.zeros_like(padded)), model(maps, None)
    for found, expected in zip(masked[1], plain[1], strict=True):
        assert torch.equal(found.scores, expected.scores)
        assert torch.equal(found.boxes, expected.boxes)


def test_visible_fractions_are_those_of_the_image():
    maps, padded = batch_of_two()
    sequence = FeatureProjection(CHANNELS, DIM)(maps, padded)
    expected = torch.tensor([[1.0, 1.0], [SMALL[1] / LARGE[1], SMALL[0] / LARGE[0]]])
    assert sequence.sizes == [(20, 24), (10, 12), (5, 6)]
    for level in range(3):
        torch.testing.assert_close(sequence.visible[:, level], expected)
    assert sequence.padded.sum(1).tolist() == [0, 20 * 24 - 12 * 8 + 10 * 12 - 6 * 4 + 5 * 6 - 3 * 2]


def test_encodings_are_sines_and_cosines():
    fractions = torch.tensor([[0.25, 0.7]])
    found = sine_encoding(fractions, 4, temperature=100.0)
    angles = torch.tensor([0.25, 0.25 / 10, 0.7, 0.7 / 10]) * 2 * torch.pi
    expected = torch.stack([angles.sin(), angles.cos()], -1).flatten()
    torch.testing.assert_close(found[0], expected)
