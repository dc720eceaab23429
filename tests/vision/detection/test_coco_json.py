"""Reading of COCO's JSON files."""

import json

import pytest

pytest.importorskip("faster_coco_eval")

from tests.support.coco_files import polygon
from tests.support.errors import raises_error
from vision.detection.coco_json import read_coco

BOX = [10, 4, 6, 8]


def data(**changes):
    """Two images, categories with non-consecutive ids, and one annotation."""
    return {
        "images": [
            {"id": 40, "file_name": "a.jpg", "height": 31, "width": 47},
            {"id": 9, "file_name": "sub/b.jpg", "height": 17, "width": 19},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"}],
        "annotations": [annotation()],
        **changes,
    }


def annotation(**changes):
    return {"id": 5, "image_id": 40, "category_id": 90, "bbox": BOX, "segmentation": [polygon(*BOX)], **changes}


def read(tmp_path, content, with_masks=True):
    path = tmp_path / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_coco(path, "data.train_annotations", with_masks)


def test_categories_are_numbered_from_1_by_their_ids(tmp_path):
    found = read(tmp_path, data())
    assert found.classes == ("person", "stop sign", "toothbrush")
    assert found.category_ids == (1, 13, 90)
    assert found.images[0].objects[0].label == 3


def test_images_without_annotations_are_kept(tmp_path):
    assert [len(image.objects) for image in read(tmp_path, data()).images] == [1, 0]


def test_boxes_become_corners_within_the_image(tmp_path):
    found = read(tmp_path, data(annotations=[annotation(bbox=[-3, 20, 60, 20.5])])).images[0].objects[0]
    assert found.box == (0.0, 20.0, 47, 31)
    assert found.written_box == (-3.0, 20.0, 60.0, 20.5)
    assert found.area == 60 * 20.5


def test_a_crowd_is_marked(tmp_path):
    runs = {"size": [31, 47], "counts": [7, 31 * 47 - 7]}
    found = read(tmp_path, data(annotations=[annotation(iscrowd=1, segmentation=runs)])).images[0].objects[0]
    assert found.is_crowd


@pytest.mark.parametrize(
    "changes",
    [
        {"image_id": 41},
        {"category_id": 2},
        {"category_id": 91},
        {"bbox": [10, 4, 0, 8]},
        {"bbox": [10, 4, 6, -8]},
        {"bbox": [47, 4, 6, 8]},
        {"bbox": [-9, -9, 9, 9]},
        {"segmentation": []},
        {"segmentation": {"size": [47, 31], "counts": [31 * 47]}},
        {"segmentation": {"size": [31, 47], "counts": [3]}},
    ],
)
def test_unusable_annotations_are_omitted_and_counted(tmp_path, changes):
    found = read(tmp_path, data(annotations=[annotation(), annotation(**changes), annotation()]))
    assert sum(len(image.objects) for image in found.images) == 2
    assert "instances.json: 1 annotations are omitted" in found.remark


def test_objects_need_no_mask_where_masks_are_not_read(tmp_path):
    found = read(tmp_path, data(annotations=[annotation(segmentation="none")]), with_masks=False)
    assert found.images[0].objects[0].segmentation is None
    assert found.remark == ""


@pytest.mark.parametrize(
    ("content", "code", "named"),
    [
        ("", "damaged-file", "instances.json"),
        ("{", "damaged-file", "instances.json"),
        ("[" * 10**5, "damaged-file", "instances.json"),
        ('{"images": NaN}', "damaged-file", "NaN"),
        ("[]", "wrong-format", "instances.json"),
        (data(images=None), "wrong-format", "images"),
        (data(annotations={}), "wrong-format", "annotations"),
        (data(annotations=[3]), "wrong-format", "annotations[0]"),
        (data(annotations=[annotation(bbox=[1, 2, 3])]), "wrong-format", "annotations[0].bbox"),
        (data(annotations=[annotation(bbox=[1, 2, 3, "4"])]), "wrong-format", "annotations[0].bbox"),
        (data(annotations=[annotation(bbox=[1, 2, 3, 10**400])]), "wrong-format", "annotations[0].bbox"),
        (data(annotations=[annotation(bbox=[1, 2, 3, 1e300])]), "wrong-format", "annotations[0].bbox"),
        (data(annotations=[annotation(image_id="40")]), "wrong-format", "annotations[0].image_id"),
        (data(annotations=[annotation(area=-1)]), "wrong-format", "annotations[0].area"),
        (data(annotations=[annotation(iscrowd=[])]), "wrong-format", "annotations[0].iscrowd"),
        (data(categories=[]), "empty-data", "categories"),
        (data(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), "name-clash", "categories[1]"),
        (data(categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]), "name-clash", "categories[1]"),
        (data(categories=[{"id": True, "name": "a"}]), "wrong-format", "categories[0].id"),
        (data(categories=[{"id": 1}]), "wrong-format", "categories[0]"),
        (data(images=[{"id": 1, "file_name": "../a.jpg", "height": 3, "width": 3}]), "invalid-value", "../a.jpg"),
        (data(images=[{"id": 1, "file_name": "/a.jpg", "height": 3, "width": 3}]), "invalid-value", "/a.jpg"),
        (data(images=[{"id": 1, "file_name": "", "height": 3, "width": 3}]), "invalid-value", "images[0]"),
        (data(images=[{"id": 1, "file_name": "a.jpg", "height": 0, "width": 3}]), "out-of-range", "images[0]"),
        (data(images=[{"id": 1, "file_name": "a.jpg", "height": 3, "width": 10**6}]), "out-of-range", "images[0]"),
        (data(images=[{"id": 1, "file_name": "a.jpg", "width": 3}]), "wrong-format", "images[0] has no height"),
        (data(images=[{"id": 1, "file_name": "a.jpg", "height": 3, "width": 3}] * 2), "name-clash", "images[1]"),
    ],
)
def test_files_of_another_format_are_refused_in_one_line(tmp_path, content, code, named):
    with raises_error(code=code, key="data.train_annotations", names=named):
        read(tmp_path, content)


def test_a_missing_file_is_named(tmp_path):
    with raises_error(code="missing-file", key="data.root", names="nothing.json"):
        read_coco(tmp_path / "nothing.json")
