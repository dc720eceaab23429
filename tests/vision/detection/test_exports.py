"""Names of `vision.detection`."""

import pkgutil
from importlib import import_module

import pytest

pytest.importorskip("torchvision")

import vision.detection


def test_no_module_has_the_name_of_an_export():
    modules = {module.name for module in pkgutil.iter_modules(vision.detection.__path__)}
    assert modules & set(vision.detection.__all__) == set()


def test_exports_exist():
    for name in vision.detection.__all__:
        value = getattr(vision.detection, name)
        assert getattr(import_module(value.__module__), name) is value


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="faster_rcnn"):
        _ = vision.detection.faster_rcnn
