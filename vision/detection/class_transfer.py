"""Weights of a detector for a detector of other classes, such as one of Objects365 for COCO."""

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
"""Names of Objects365 for classes that COCO calls otherwise; the other 69 classes of COCO have the same names there."""

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
"""The 80 classes of COCO among the 365 of Objects365 v2, counted from 0, for files that do not name their classes."""

OBJECTS365_COUNT = 365

CLASS_BIAS = "proposals.head.classes.bias"
"""A parameter that every DINO has, with one number for each class."""

LEFT_OUT = ("denoising.labels.weight",)
"""Weights that training alone needs: a file may lack them, and a detector without denoising leaves them out."""


def class_rows(given: Sequence[str] | int, wanted: Sequence[str]) -> list[int | None]:
    """For each class that is wanted, its number among those of a file; None if it is not there.

    Args:
        given: names of the file's classes, or how many there are if it does not name them. 365 are those of Objects365,
            as many as are wanted are the same ones, and of others nothing is known.
        wanted: names, compared without regard to case; `SAME_CLASSES` are the same.
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
    """Put the weights of a DINO into a new one, or those of a backbone into the backbone of any detector.

    Rows of the class heads and of the label embedding go to the classes of the same names; classes that the file does
    not have begin anew. Everything else must be there and fit.

    Args:
        model: the detector.
        config: which weights; with `head: new` all classes begin anew.
        classes: of the data, in the order of their labels.
        world: the processes of the run; the first fetches what has to be fetched.

    Returns:
        A sentence about what was done.

    Raises:
        CheckpointError: there are no such weights, they are damaged, or of another model.
    """
    content, name = finetune.find_pretrained(config.source, world or World())
    given = tensors_in(content, config.weights, name)
    if not isinstance(model, DINO) or CLASS_BIAS not in given:
        backbone = next(module for module in model.modules() if isinstance(module, RevCol))
        return finetune.begin(backbone, config, (), world)
    names, count = finetune.class_names_in(content), given[CLASS_BIAS].numel()
    if names is not None and len(names) != count:
        problem = f"names {len(names)} classes, and its weights are for {count}"
        raise CheckpointError(name, problem, "Give another file", code="weights-mismatch")
    rows = [None] * len(classes) if config.head == "new" else class_rows(count if names is None else names, classes)
    model.load_state_dict(_fitted(given, model, rows, count, name))
    found = sum(row is not None for row in rows)
    return f"{config.weights} weights of {name}, with {found} of {len(classes)} classes"


def _fitted(
    given: Mapping[str, Tensor], model: DINO, rows: Sequence[int | None], count: int, path: str
) -> dict[str, Tensor]:
    """The state of a model: all of the file's, but rows of classes by their new numbers."""
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
        remedy = "Give a file of a DINO with the same backbone and options"
        raise CheckpointError(path, problem, remedy, code="weights-mismatch") from None
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
