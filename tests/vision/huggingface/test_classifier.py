"""RevCol as an image classifier of transformers."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import timm
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from vision.huggingface import RevColBackboneConfig, RevColForImageClassification


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    # 112 / 0.875 - 112 is even: an odd margin is divided in two ways by timm and by transformers
    model = timm.create_model("test_revcol", num_classes=3, pretrained_cfg_overlay={"input_size": (3, 112, 112)})
    return RevColForImageClassification.from_timm(model, ["cat", "dog", "cow"]).eval()


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((137, 137), Image.Resampling.BICUBIC)


def test_logits_are_those_of_timm(classifier):
    images = torch.randn(2, 3, 97, 89)
    assert torch.equal(classifier(images).logits, classifier.revcol(images))


def test_the_loss_is_the_cross_entropy(classifier):
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 2, 1, 1])
    output = classifier(images, labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))


def test_a_saved_classifier_gives_equal_logits(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 61, 67)
    assert torch.equal(again(images).logits, classifier(images).logits)
    assert again.config.id2label == {0: "cat", 1: "dog", 2: "cow"}


def test_a_new_classifier_replaces_one_of_another_size(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    again = RevColForImageClassification.from_pretrained(tmp_path, **options).eval()
    images = torch.randn(1, 3, 61, 67)
    assert torch.equal(again.revcol.forward_features(images), classifier.revcol.forward_features(images))
    assert again(images).logits.shape == (1, 5)
    assert torch.isfinite(again(images).logits).all()


def test_new_classifiers_begin_with_scaled_weights(classifier, tmp_path):
    config = RevColBackboneConfig(name="test_revcol", num_labels=5, head_init_scale=1e-3)
    assert RevColForImageClassification(config).revcol.head.fc.weight.abs().max() < 1e-3
    classifier.save_pretrained(tmp_path)
    options = {"num_labels": 5, "head_init_scale": 1e-3, "ignore_mismatched_sizes": True}
    again = RevColForImageClassification.from_pretrained(tmp_path, **options)
    assert 0 < again.revcol.head.fc.weight.abs().max() < 1e-3


def test_the_processor_prepares_images_as_timm_does(classifier, picture):
    transform = create_transform(**resolve_model_data_config(classifier.revcol), is_training=False)
    ours = classifier.image_processor()(picture, return_tensors="pt")["pixel_values"][0]
    expected = transform(picture)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().mean() < 0.02  # pixels are rounded at other places


def test_a_pipeline_loads_the_saved_directory(classifier, picture, tmp_path):
    classifier.save_pretrained(tmp_path)
    classifier.image_processor().save_pretrained(tmp_path)
    predictions = pipeline("image-classification", model=str(tmp_path))(picture)
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"]
    scores = classifier(pixels).logits.softmax(-1)[0]
    assert predictions[0]["label"] == classifier.config.id2label[int(scores.argmax())]
    torch.testing.assert_close(predictions[0]["score"], scores.max().item())


def test_the_number_of_names_must_match_the_classes():
    model = timm.create_model("test_revcol", num_classes=3)
    with pytest.raises(ValueError) as caught:
        RevColForImageClassification.from_timm(model, ["cat", "dog"])
    assert (caught.value.key, caught.value.code) == ("classes", "wrong-length")


def test_a_pruned_model_is_refused():
    model = timm.create_model("test_revcol", num_classes=3)
    model.prune_intermediate_layers([1])
    with pytest.raises(ValueError) as caught:
        RevColForImageClassification.from_timm(model)
    assert caught.value.code == "no-spec"


def test_a_configuration_describes_a_revised_model():
    model = timm.create_model("test_revcol", columns=3, depths=[1, 1, 2, 1], num_classes=0, in_chans=1)
    config = RevColForImageClassification.from_timm(model).config
    assert isinstance(config, RevColBackboneConfig)
    assert config.spec() == model.spec
