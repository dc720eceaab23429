"""Initialization of a detector from one with other classes, such as a COCO detector from an Objects365 detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from vision.config.learning import PretrainedConfig
from vision.detection.dino_detr.dino_detector import DINO
from vision.distributed.context import World
from vision.errors import CheckpointError, comparable
from vision.models.architecture import RevCol
from vision.weights import finetune
from vision.weights.files import tensors_in
from vision.weights.kernel_padding import fit_kernels
from vision.weights.official_names import MismatchError, check

SAME_CLASSES = {
    "wild bird": "bird",
    "handbag/satchel": "handbag",
    "luggage": "suitcase",
    "skiboard": "skis",
    "other balls": "sports ball",
    "bowl/basin": "bowl",
    "orange/tangerine": "orange",
    "dinning table": "dining table",
    "moniter/tv": "tv",
    "monitor/tv": "tv",
    "stuffed toy": "teddy bear",
    "hair dryer": "hair drier",
}
"""Classes that Objects365 and COCO name differently. The other 69 classes of COCO have the same names in both."""

_NUMBERS = """person 0, bicycle 46, car 5, motorcycle 58, airplane 114, bus 55, train 116, truck 65, boat 21,
traffic light 40, fire hydrant 176, stop sign 127, parking meter 249, bench 24, bird 56, cat 139, dog 92, horse 78,
sheep 99, cow 96, elephant 144, bear 295, zebra 178, giraffe 180, backpack 38, umbrella 39, handbag 13, tie 43,
suitcase 120, frisbee 219, skis 119, snowboard 173, sports ball 156, kite 154, baseball bat 137, baseball glove 113,
skateboard 145, surfboard 146, tennis racket 204, bottle 8, wine glass 35, cup 10, fork 88, knife 84, spoon 93, bowl 26,
banana 112, apple 82, sandwich 265, orange 104, broccoli 141, carrot 152, hot dog 234, pizza 143, donut 150, cake 97,
chair 2, couch 50, potted plant 25, bed 75, dining table 98, toilet 153, tv 37, laptop 73, mouse 115, remote 132,
keyboard 106, cell phone 61, microwave 163, oven 134, toaster 277, sink 81, refrigerator 133, book 18, clock 94,
vase 30, scissors 169, teddy bear 70, hair drier 328, toothbrush 226"""
OBJECTS365_ROWS = {name: int(row) for name, _, row in (item.strip().rpartition(" ") for item in _NUMBERS.split(","))}
"""Index of each COCO class among the 365 classes of Objects365 v2, for files without class names."""

OBJECTS365_COUNT = 365

CLASS_BIAS = "proposals.head.classes.bias"
"""A parameter of every DINO, with one element for each class."""

LEFT_OUT = ("denoising.labels.weight",)
"""Weights that only training needs. A file may lack them, and a detector without denoising does not have them."""


def class_rows(given: Sequence[str] | int, wanted: Sequence[str]) -> list[int | None]:
    """Return the index of each class among the classes of a file; None for classes that the file does not have.

    Args:
        given: Names of the classes of the file, or their number if it has no names. If the number equals that of
            `wanted`, the classes are the same; 365 classes are those of Objects365; all others are unknown.
        wanted: Names of the classes to find. Case does not matter, and `SAME_CLASSES` lists synonyms.
    """
    if isinstance(given, int):
        if given == len(wanted):
            return list(range(given))
        rows = OBJECTS365_ROWS if given == OBJECTS365_COUNT else {}
    else:
        rows = {_canonical(name): row for row, name in reversed(list(enumerate(given)))}
    return [rows.get(_canonical(name)) for name in wanted]


def begin_detector(
    model: nn.Module, config: PretrainedConfig, classes: Sequence[str], world: World | None = None
) -> str:
    """Load the weights of a DINO into another DINO, or those of a backbone into the backbone of any detector.

    Rows of the class heads and of the label embedding are matched by class name. Classes that the file does not have
    keep their initialization. All other weights must exist and have the same shapes.

    Args:
        model: The detector.
        config: Names the weights. With `head: new`, all classes keep their initialization.
        classes: Names of the classes of the data, in the order of their labels.
        world: Distributed context of the run. The first process downloads the weights.

    Returns:
        A sentence that describes the loaded weights.

    Raises:
        CheckpointError: If the weights do not exist, are damaged, or belong to another model.
    """
    content, name = finetune.find_pretrained(config.source, world or World())
    given = tensors_in(content, config.weights, name)
    if not isinstance(model, DINO) or CLASS_BIAS not in given:
        backbone = next(module for module in model.modules() if isinstance(module, RevCol))
        return finetune.begin(backbone, config, (), world)
    names, count = finetune.class_names_in(content), given[CLASS_BIAS].numel()
    if names is not None and len(names) != count:
        problem = f"has {len(names)} class names, but weights for {count} classes"
        raise CheckpointError(name, problem, "Use another file", code="weights-mismatch")
    rows = [None] * len(classes) if config.head == "new" else class_rows(count if names is None else names, classes)
    model.load_state_dict(_fitted(given, model, rows, count, name))
    found = sum(row is not None for row in rows)
    return f"{config.weights} weights of {name}, with {found} of {len(classes)} classes"


def _fitted(
    given: Mapping[str, Tensor], model: DINO, rows: Sequence[int | None], count: int, path: str
) -> dict[str, Tensor]:
    """Return the state dict of the model: the tensors of the file, with the rows of classes reordered."""
    own = model.state_dict()
    by_class = model.class_parameters()
    state = fit_kernels({key: tensor for key, tensor in given.items() if key in own or key not in LEFT_OUT}, own)
    shapes = {
        key: (count, *tensor.shape[1:]) if key in by_class else tuple(tensor.shape) for key, tensor in own.items()
    }
    try:
        check(shapes, state, optional=LEFT_OUT)
    except MismatchError as error:
        problem = f"not the weights of this detector: {error.problems[0]}"
        hint = "Use a file of a DINO with the same backbone and options"
        raise CheckpointError(path, problem, hint, code="weights-mismatch") from None
    pairs = [(new, old) for new, old in enumerate(rows) if old is not None]
    for key in by_class & set(state):
        moved = own[key].clone()
        for new, old in pairs:
            moved[new] = state[key][old].to(moved)
        state[key] = moved
    return {**own, **state}


def _canonical(name: str) -> str:
    plain = comparable(name).strip().casefold()
    return SAME_CLASSES.get(plain, plain)
