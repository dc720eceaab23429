"""The decoders of intermediate supervision compared with their operators."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.support.supervision_tasks import batch, create_task
from vision.config.learning import SupervisionConfig
from vision.supervision.decoders import SingleDecoder, StagedDecoder
from vision.supervision.supervised import Supervised, reconstruction_loss


def test_staged_decoder() -> None:
    """Each stage equals the operators of the paper's decoder, channels first."""
    decoder = StagedDecoder([4, 6, 10], [4, 8, 16]).double()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 3, 5, 10, dtype=torch.float64)
    y = x.permute(0, 3, 1, 2)
    for stage in decoder.stages:
        y = F.conv2d(y, stage.proj.weight[..., None, None], stage.proj.bias)
        y = F.gelu(F.layer_norm(y.movedim(1, -1), (y.shape[1],), *stage.norm.parameters(), 1e-6)).movedim(-1, 1)
        y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
        assert stage.block.mlp.fc1.out_features == stage.block.dwconv.in_channels  # no expansion
        y = stage.block(y.movedim(1, -1)).movedim(-1, 1)
    y = F.conv2d(y, decoder.to_pixels.proj.weight[..., None, None], decoder.to_pixels.proj.bias)
    assert_close(decoder(x), F.pixel_shuffle(y, 4))
    assert decoder(x).shape == (2, 3, 48, 80)


def test_single_decoder() -> None:
    decoder = SingleDecoder(10, 8, channels=2)
    x = torch.randn(2, 3, 5, 10)
    patches = decoder.to_pixels.proj(decoder.norm(x)).unflatten(-1, (2, 8, 8))  # (B, H, W, C, row, column)
    assert_close(decoder(x), patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_single_decoder_can_be_exported() -> None:
    """Scripted, and exported for any number of images."""
    decoder, x = SingleDecoder(10, 8, channels=2).eval(), torch.randn(3, 3, 5, 10)
    exported = torch.export.export(decoder, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch", max=7)},))
    for other in (torch.jit.script(decoder), exported.module()):
        assert_close(other(x), decoder(x))


def test_pixels_have_the_memory_format_of_their_patches() -> None:
    """That of `pixel_shuffle`: sums over all pixels, as in the loss, add up in the same order."""
    pixels = SingleDecoder(10, 8)(torch.randn(2, 3, 5, 10))
    assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_which_decoder() -> None:
    kinds = {}
    for classes, kind in ((1000, "auto"), (1001, "auto"), (1001, "staged"), (7, "single")):
        supervised = Supervised(timm.create_model("test_revcol", num_classes=classes), SupervisionConfig(decoder=kind))
        kinds[classes, kind] = {type(decoder) for decoder in supervised.decoders.values()}
    assert list(kinds.values()) == [{StagedDecoder}, {SingleDecoder}, {StagedDecoder}, {SingleDecoder}]
    isotropic = create_task(3, "test_revcol_vit", SupervisionConfig(decoder="single"))
    assert isotropic(*batch())["loss"].isfinite()


@pytest.mark.parametrize(("side", "compared"), [(64, 64), (70, 70), (65, 64)])
def test_images_of_any_side_are_compared(side: int, compared: int) -> None:
    task, (images, _) = create_task(), batch(2, side)
    pixels = task.supervised()(images).pixels[0]
    image = task.image(images)
    expected = F.binary_cross_entropy(pixels[..., :compared, :compared].sigmoid(), image[..., :compared, :compared])
    assert_close(reconstruction_loss(pixels, image), expected)
