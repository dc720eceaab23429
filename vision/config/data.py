"""Schema of the key `data` of a training run: digits, idx files, timm's readers, semantic maps, or COCO files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from revnets.config.errors import explain, nearest, problem, show, what
from revnets.config.loader import Strict, UserPath, validate

Triple = tuple[float, float, float]
Pair = tuple[float, float]


class SmallImagesConfig(Strict):
    """Augmentation of images that are held in memory: one random affine map per image."""

    img_size: int = Field(default=16, ge=8, le=128)
    shift: float = Field(default=0.1, ge=0, lt=1)  # largest random shift, as a fraction of the side
    rotate: float = Field(default=10.0, ge=0, le=180)  # largest random angle, degrees
    scale: float = Field(default=0.1, ge=0, lt=1)  # largest random change of size, as a fraction of the size
    hflip: float = Field(default=0.0, ge=0, le=1)  # probability of a horizontal flip


class DigitsConfig(SmallImagesConfig):
    """scikit-learn's handwritten digits: 1797 real images of 8 x 8, enlarged to `img_size`."""

    name: Literal["digits"] = "digits"


class IdxConfig(SmallImagesConfig):
    """Four files in idx format, gzipped or not, such as MNIST and Fashion-MNIST."""

    name: Literal["idx"]
    root: UserPath = Field(
        examples=["/usr/share/datasets/fashion-mnist"], min_length=1
    )  # directory with the four files
    img_size: int = Field(default=28, ge=8, le=128)
    classes: tuple[str, ...] | None = None  # names of the classes, from class 0
    train_samples: int | None = Field(default=None, ge=1)  # use only the first training images, for quick runs


class AugmentConfig(Strict):
    """Arguments of `timm.data.create_transform` for training. `auto_augment` disables `color_jitter`."""

    scale: Pair = (0.08, 1.0)  # area of the random crop, as a fraction of the image
    ratio: Pair = (3 / 4, 4 / 3)  # width / height of the random crop
    hflip: float = Field(default=0.5, ge=0, le=1)
    vflip: float = Field(default=0.0, ge=0, le=1)
    color_jitter: float | None = Field(default=0.4, ge=0)
    auto_augment: str | None = None  # such as rand-m9-mstd0.5-inc1
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    re_prob: float = Field(default=0.0, ge=0, le=1)  # random erasing
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    re_count: int = Field(default=1, ge=1)

    @field_validator("auto_augment")
    @classmethod
    def _policy(cls, text: str | None) -> str | None:
        policies = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")
        if text is not None and text.split("-")[0] not in policies:
            raise problem(
                f"timm has no policy {text!r}", "Give for example rand-m9-mstd0.5-inc1", code="invalid-syntax"
            )
        return text


READERS = ("folder", "tar", "hfds/", "hfids/", "wds/")
"""Readers that `name` may select. The name of a data set follows the slash."""

STREAMS = ("hfids/", "wds/")
"""Readers that read samples sequentially."""


UNSAFE = ("pandas", "spark")
"""Formats of Hugging Face `datasets` that unpickle files of the working directory or run other code."""


class ImagesConfig(Strict):
    """Images from one of timm's readers.

    - `folder`: root/train/CLASS/x.jpg
    - `tar`: root/train.tar, or root/train/*.tar
    - `hfds/NAME`: a Hugging Face data set
    - `hfids/NAME`: a Hugging Face data set, streamed
    - `wds/`: webdataset shards in root
    """

    name: str = Field(examples=["folder"])
    root: UserPath | None = None  # directory of the data; the cache of hfds and hfids
    train_split: str = "train"
    val_split: str = "validation"
    class_map: UserPath | None = None  # file with one class name per line
    num_classes: int | None = Field(default=None, ge=2, le=10**6)  # where the reader does not report it
    train_samples: int | None = Field(default=None, ge=1)  # length of a stream that does not report it
    val_samples: int | None = Field(default=None, ge=1)
    input_key: str | None = None  # suffixes for folder and tar, such as .jpg;.webp; otherwise field names, as in timm
    target_key: str | None = None
    img_size: int = Field(default=224, ge=8, le=16_384)
    mean: Triple = IMAGENET_DEFAULT_MEAN
    std: Triple = IMAGENET_DEFAULT_STD
    crop_pct: float = Field(default=0.875, gt=0, le=1)  # for validation: resize to 256, then crop the central 224
    crop_mode: Literal["center", "squash", "border"] = "center"
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"  # for validation
    augment: AugmentConfig = AugmentConfig()
    exif: Literal["ignore", "apply"] = "ignore"  # whether images are rotated by their EXIF orientation
    unreadable: Literal["skip", "stop"] = "skip"  # replace a broken image by the next one and count it, or stop
    exclude: UserPath | None = None  # keys of images to exclude from training, one per line, or a Parquet file
    head: str | None = None  # in a run with `heads`: the head that the class directories belong to
    labels: UserPath | None = None  # in a run with `heads`: directory of soft labels, from `revnets label`
    weight: float | None = Field(default=None, gt=0)  # of one of several sources; null: its number of images

    @property
    def is_stream(self) -> bool:
        return self.name.startswith(STREAMS)

    @field_validator("name")
    @classmethod
    def _reader(cls, name: str) -> str:
        if name.rstrip("/").split("/", 1)[-1] in UNSAFE:
            raise problem(f"{name!r} would execute pickled files", "Give a data set of images", code="unsafe-file")
        if name in ("folder", "tar", "wds", "wds/") or (
            name.startswith(("hfds/", "hfids/", "wds/")) and name[-1] != "/"
        ):
            return name + "/" * (name == "wds")
        known = ["digits", "idx", "semantic_maps", "coco", *READERS]
        raise problem(
            f"unknown data set or reader {name!r}", nearest(name, known, "Known names are"), code="unknown-choice"
        )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.root is None and self.name in ("folder", "tar", "wds/"):
            raise problem(
                "this key is missing",
                "Give the directory of the data, as in `data.root=/data/imagenet`",
                "root",
                code="missing-key",
            )
        return self


class SourcesConfig(Strict):
    """Several data sets of images, which an epoch mixes by their weights. A list in YAML."""

    sources: tuple[ImagesConfig, ...] = Field(min_length=1)

    PREPARED: ClassVar = ("img_size", "mean", "std", "crop_pct", "crop_mode", "interpolation", "exif", "unreadable")
    """Keys that must be equal in all sources, because one model sees all images."""

    @property
    def img_size(self) -> int:
        return self.sources[0].img_size

    @property
    def is_stream(self) -> bool:
        return self.sources[0].is_stream

    @model_validator(mode="after")
    def _alike(self) -> Self:
        first = self.sources[0]
        for number, source in enumerate(self.sources):
            for key in (*self.PREPARED, "is_stream"):
                ours, theirs = getattr(source, key), getattr(first, key)
                if ours != theirs:
                    text = f"{show(ours)}, but the first source has {show(theirs)}"
                    if key == "is_stream":
                        key, text = "name", "streams cannot be mixed with files"
                    raise problem(text, "Use the same in all sources", number, key, code="conflicting-values")
            if (source.weight is None) != (first.weight is None):
                text = "only some of the sources have a weight"
                raise problem(text, "Give a weight to each source or to none", number, "weight", code="missing-key")
        return self

    @model_serializer
    def _listed(self) -> list[Any]:
        return [source.model_dump(mode="json") for source in self.sources]


class SemanticMapsConfig(Strict):
    """Images with a class for every pixel, in the directory layout of ADE20K.

    An image root/images/SPLIT/x.jpg has the map root/annotations/SPLIT/x.png, whose gray values or palette indices are
    class numbers. The defaults are those of the RevCol release for crops of 512.
    """

    name: Literal["semantic_maps"]
    root: UserPath = Field(min_length=1, examples=["/data/ADEChallengeData2016"])
    images: str = "images"  # directories in root
    annotations: str = "annotations"
    train_split: str = "training"
    val_split: str = "validation"
    num_classes: int = Field(ge=2, le=255, examples=[150])
    class_map: UserPath | None = None  # file with one class name per line
    reduce_zero_label: bool = False  # 0 in a map is not a class, and 1 is class 0 (ADE20K)
    img_size: int = Field(default=512, ge=8, le=4096)  # side of the training crops
    short_side: int = Field(default=512, ge=8, le=16_384)  # images are resized to the largest size within both limits
    long_side: int = Field(default=2048, ge=8, le=16_384)
    scale: Pair = (0.5, 2.0)  # random factor of both sides in training
    most_of_one_class: float = Field(default=0.75, gt=0, le=1)  # crops with a larger part of one class are redrawn
    hflip: float = Field(default=0.5, ge=0, le=1)
    photometric: bool = True  # random brightness, contrast, saturation and hue
    window: int | None = Field(default=None, ge=8, le=16_384)  # for validation; None for the whole image at once
    stride: int | None = Field(default=None, ge=1, le=16_384)
    scales: tuple[float, ...] = (1.0,)  # for validation; several for multi-scale evaluation
    flip: bool = False  # also evaluate mirrored images
    mean: Triple = IMAGENET_DEFAULT_MEAN
    std: Triple = IMAGENET_DEFAULT_STD
    unreadable: Literal["skip", "stop"] = "skip"

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.window is None) != (self.stride is None):
            raise problem("window and stride are used together", "Give both or neither", "stride", code="missing-key")
        if self.window is not None and self.stride is not None and self.stride > self.window:
            text = f"a stride of {self.stride} skips pixels between windows of {self.window}"
            raise problem(text, f"Give at most {self.window}", "stride", code="out-of-range")
        if not self.scales or not all(0.01 <= scale <= 100 for scale in self.scales):
            text = f"{list(self.scales)} is not a list of factors"
            raise problem(text, "Give factors from 0.01 to 100", "scales", code="out-of-range")
        if not 0.01 <= self.scale[0] <= self.scale[1] <= 100:
            text = f"{list(self.scale)} is not a range of factors"
            raise problem(text, "Give two factors from 0.01 to 100, the smaller first", "scale", code="out-of-range")
        return self


class CocoConfig(Strict):
    """Images with boxes and masks of objects in COCO's format, augmented as in the RevCol release (as in DETR)."""

    name: Literal["coco"]
    root: UserPath = Field(min_length=1, examples=["/data/coco"])
    train_images: str = "train2017"  # directories in root
    val_images: str = "val2017"
    train_annotations: str = "annotations/instances_train2017.json"
    val_annotations: str = "annotations/instances_val2017.json"
    masks: bool = True  # read masks of objects and skip objects without a mask
    stuff_maps: str | None = None  # directory in root with a semantic map (.png) for each training image, for HTC
    keep_empty: bool = False  # also train on images without objects
    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))  # one is drawn for each training image
    long_side: int = Field(default=1333, ge=8, le=16_384)  # images are resized to the largest size within both limits
    crop: float = Field(default=0.5, ge=0, le=1)  # probability that a training image is cropped before it is resized
    crop_short_sides: tuple[int, ...] = (400, 500, 600)  # short sides before the crop
    crop_sizes: tuple[int, int] = (384, 600)  # smallest and largest side of the crop
    hflip: float = Field(default=0.5, ge=0, le=1)
    val_short_side: int = Field(default=800, ge=8, le=16_384)
    mean: Triple = IMAGENET_DEFAULT_MEAN
    std: Triple = IMAGENET_DEFAULT_STD
    unreadable: Literal["skip", "stop"] = "skip"

    @property
    def img_size(self) -> int:
        return self.long_side

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for key in ("short_sides", "crop_short_sides", "crop_sizes"):
            sides = getattr(self, key)
            if not sides or not all(8 <= side <= 16_384 for side in sides) or list(sides) != sorted(sides):
                text = f"{list(sides)} is not an increasing list of sides"
                raise problem(text, "Give sides from 8 to 16384 in order", key, code="out-of-range")
        return self


def _by_name(value: Any) -> Any:
    """Validate `data` by the schema that its `name` selects, so that an error concerns the keys of this schema only."""
    if isinstance(value, Strict):
        return value
    if isinstance(value, (list, tuple)):
        return _sources(value)
    if not isinstance(value, dict):
        raise problem(what(value), "Give a mapping, as in {name: folder, root: /data/imagenet}", code="wrong-type")
    if not isinstance(value.get("name", "digits"), str):
        raise problem(what(value["name"]), "Give the name of a data set, such as digits", "name", code="wrong-type")
    kinds = {"digits": DigitsConfig, "idx": IdxConfig, "semantic_maps": SemanticMapsConfig, "coco": CocoConfig}
    kind = kinds.get(value.get("name", "digits"), ImagesConfig)
    try:
        return validate(TypeAdapter(kind), value)
    except ValidationError as error:
        complaint = explain(error, value, kind)
    raise problem(complaint.problem, complaint.remedy, *complaint.keys, code=complaint.code)


def _sources(values: Sequence[Any]) -> SourcesConfig:
    """Validate a list of sources. Errors name the index of the source."""
    sources = []
    if not values:
        raise problem("the list is empty", "Give a mapping for each source", code="wrong-length")
    for number, value in enumerate(values):
        if isinstance(value, dict) and value.get("name") in ("digits", "idx", "semantic_maps", "coco"):
            text = f"{show(value['name'])} cannot be in a list of sources"
            raise problem(text, f"Give one of {', '.join(READERS)}", number, "name", code="conflicting-values")
        try:
            sources.append(value if isinstance(value, ImagesConfig) else validate(TypeAdapter(ImagesConfig), value))
        except ValidationError as error:
            complaint = explain(error, value, ImagesConfig)
            raise problem(complaint.problem, complaint.remedy, number, *complaint.keys, code=complaint.code) from None
    try:
        return SourcesConfig(sources=tuple(sources))
    except ValidationError as error:
        complaint = explain(error, {"sources": sources})
        keys = complaint.keys if complaint.keys[:1] != ("sources",) else complaint.keys[1:]
        raise problem(complaint.problem, complaint.remedy, *keys, code=complaint.code) from None


def images_in(data: Any) -> ImagesConfig | None:
    """The settings by which all sources read images; None for data that timm's readers do not read."""
    data = data.sources[0] if isinstance(data, SourcesConfig) else data
    return data if isinstance(data, ImagesConfig) else None


DataConfig = Annotated[
    DigitsConfig | IdxConfig | ImagesConfig | SemanticMapsConfig | CocoConfig | SourcesConfig, BeforeValidator(_by_name)
]
