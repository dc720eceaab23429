"""Language models in the trainer of `vision.training`: their task, and the command `revnets train-lm`.

This module alone of `nlp` imports `vision`, whose trainer knows nothing of images: a task gives it data, a model, a
loss and metrics. B sequences, L tokens of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from revnets import SpecError
from revnets.config.errors import what
from revnets.config.loader import Source, Strict, read_layers
from revnets.utils.atomic_files import replacing_folder
from vision.checkpoints import reader
from vision.config.run import TrainConfig, TransformersModel
from vision.data.dataset import Unreadable
from vision.distributed.context import World, joined
from vision.errors import EXPECTED as EXPECTED
from vision.errors import CheckpointError
from vision.tasks import Task
from vision.tasks.builders import create_model
from vision.training.trainer import Outcome, Trainer

from .configuration import RevColLMConfig as RevColLMConfig  # registers the model for {hf: revcol_lm}
from .loss import IGNORED
from .packed_text import PackedText, Sample, encoded, uncounted
from .text_documents import Files, documents, error, held_out
from .text_tokenizers import BYTES, byte_tokenizer, learned_tokenizer, saved_tokenizer


class PairsConfig(Strict):
    """A tokenizer of byte pairs, which is learned from the text to train on."""

    pairs: int = Field(gt=BYTES + 1, le=2**20)  # tokens, all bytes and the end of a document included


class TextConfig(Strict):
    """The text of a run, and how it is cut into tokens and sequences."""

    train: Files
    val: Annotated[float, Field(gt=0, lt=1)] | Files = 0.05  # a share of the documents, or others
    tokenizer: str | PairsConfig = "bytes"  # bytes, {pairs: 1024}, a folder, or a name of the hub
    length: int = Field(default=256, ge=2, le=2**24)  # tokens of a sequence


@dataclass(frozen=True, slots=True)
class TextData:
    """The data of a run, as the trainer wants them, and what they were made with."""

    train: PackedText
    val: PackedText
    tokenizer: Any
    val_bytes: int  # of the documents to validate on, in UTF-8
    unreadable: Unreadable = field(default_factory=Unreadable)


class LanguageModeling(Task):
    """The next token of packed sequences. A batch is `input_ids` and `labels`, (B, L) each.

    The metric is bits per byte, which does not depend on the tokenizer: all bits that the held-out tokens take, divided
    by the bytes of their text.
    """

    monitor, label, digits, samples = "bits_per_byte", "bits per byte", 4, ("tokens", "tok")

    def __init__(self, config: TrainConfig, train: Any, val: Any = 0.05, tokenizer: Any = "bytes", length: int = 256):
        super().__init__(config)
        given = {"train": train, "val": val, "tokenizer": tokenizer, "length": length}
        try:
            self.source = read_layers(given, "training run").check(TextConfig)
        except SpecError as problem:
            key = f"task.{problem.key}"
            raise SpecError(problem.source, key, problem.message, problem.hint, problem.code) from None

    # ------------------------------------------------------------------------------------------------------- data

    def load_data(self, notes: Path | None = None, world: World | None = None) -> TextData:
        """Read and encode the text.

        Raises:
            revnets.SpecError: it cannot be read, or is too short.
        """
        text, train = self.source, documents(self.source.train, "train")
        if isinstance(text.val, float | int):
            train, val = held_out(train, text.val)
        else:
            val = documents(text.val, "val")
        tokenizer = self._tokenizer(train)
        tokens, held = encoded(train, tokenizer), encoded(val, tokenizer)
        end = tokenizer.eos_token_id
        return TextData(
            PackedText(tokens, text.length, end, self.config.seed, "train"),
            PackedText(held, text.length, end, None, "val"),
            tokenizer,
            sum(len(document.encode("utf-8")) for document in val),
        )

    def _tokenizer(self, texts: Sequence[str]) -> Any:
        name = self.source.tokenizer
        if isinstance(name, PairsConfig):
            return learned_tokenizer(texts, name.pairs)
        if name == "bytes":
            return byte_tokenizer()
        try:
            tokenizer = saved_tokenizer(name)
        except SpecError as problem:
            raise error("tokenizer", f"{name}: {problem.message}", problem.hint, problem.code) from None
        if tokenizer.eos_token_id is None:
            raise error("tokenizer", f"{name} has no token for the end of a text", "Set its eos_token", "missing-key")
        return tokenizer

    def padding(self, sample: Sample) -> Sample:
        return uncounted(sample)

    def batch_size(self, batch: Mapping[str, Tensor]) -> int:
        """Tokens, which are what the log counts."""
        return batch["input_ids"].numel()

    def metadata(self, data: TextData) -> dict[str, Any]:
        return {"tokens": len(data.train.tokens), "val_bytes": data.val_bytes}

    def input_shape(self, data: TextData) -> tuple[int, ...]:
        return (self.source.length,)

    # ------------------------------------------------------------------------------------------------------ model

    def build_model(self, data: TextData) -> nn.Module:
        """The model that the key `model` describes, for the tokens and the length of the text.

        Raises:
            revnets.SpecError: it is no language model, or has too few tokens or positions.
        """
        given = self.config.model
        if not isinstance(given, TransformersModel):
            remedy = "Give {hf: revcol_lm, hidden_size: 256, ...}, or the type of another model, such as gpt2"
            raise SpecError("training run", "model", "this is no language model", remedy, code="wrong-type")
        tokens, end = len(data.tokenizer), data.tokenizer.eos_token_id
        sizes = {"vocab_size": tokens, "max_position_embeddings": self.source.length}
        for key, least in sizes.items():
            value = given.options.get(key)
            if isinstance(value, int) and value < least:
                problem = f"{value:,}, but the text has {least:,}"
                raise SpecError("training run", f"model.{key}", problem, "Leave the key out", code="conflicting-values")
        # no padding: many models never train that token's embedding, and here it is the end of a text
        ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
        return create_model(self.config, **sizes, **ends)

    def planned(self, model: nn.Module) -> nn.Module:
        return NextTokenLoss(model)

    # ------------------------------------------------------------------------------------------- loss and metrics

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(**batch).loss

    def predict(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of a batch in nats."""
        return model(**batch, **self._options).loss

    def evaluator(self, model: nn.Module, data: TextData, device: torch.device) -> BitsPerByte:
        return BitsPerByte(data.val_bytes, device)

    @property
    def _options(self) -> dict[str, Any]:
        own = cast(TransformersModel, self.config.model).hf == RevColLMConfig.model_type
        return {"skip_logits": True} if own else {}


class NextTokenLoss(nn.Module):
    """A language model from tokens (B, L) to its loss, for copies without values."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.long()
        return self.model(input_ids=tokens, labels=tokens).loss


class BitsPerByte:
    """The loss of held-out text: in nats a token, and in bits a byte.

    Args:
        count: bytes of the whole text.
        device: of the model.
    """

    def __init__(self, count: int, device: torch.device):
        self.bytes = count
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens

    def update(self, output: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Add the mean loss of a batch."""
        count = (batch["labels"][:, 1:] != IGNORED).sum()
        if count:
            self.sums += torch.stack([output.double() * count, count.double()])

    def compute(self, world: World) -> dict[str, float]:
        """`loss` and `bits_per_byte` of the text of all processes."""
        if world.size > 1:
            dist.all_reduce(self.sums)
        nats, tokens = self.sums.tolist()
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / self.bytes}


def load_language_run(source: Source, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a run of `revnets train-lm`: that of `revnets train`, whose key `text` makes the task.

    Raises:
        revnets.SpecError: names the file, the key, the value and the remedy.
    """
    layers = read_layers(source)
    layers.apply(overrides)
    if "text" in layers.data:
        text = layers.data.pop("text")
        if not isinstance(text, dict):
            raise SpecError(layers.name, "text", what(text), "Give a mapping, as in {train: texts}", code="wrong-type")
        layers.set("task", {"type": f"{__name__}:{LanguageModeling.__name__}", **text})
    elif "task" not in layers.data:
        remedy = "Add it, as in `text: {train: texts}`"
        raise SpecError(layers.name, "text", "this key is missing", remedy, code="missing-key")
    return layers.check(TrainConfig, trust=True)


def train_language_model(config: TrainConfig) -> tuple[Outcome, Path | None]:
    """Train, and leave the best weights in the folder `model` of the run, as transformers reads them.

    Returns:
        How the run ended, and the folder, if it was written by this process.

    Raises:
        vision.errors.TrainingError, vision.errors.CheckpointError, revnets.SpecError: as `Trainer` does.
    """
    with joined(config.device) as world:
        trainer = Trainer(config, world=world)
        outcome = trainer.fit()
        path = outcome.best or outcome.last
        if outcome.signal is not None or path is None or not world.is_main:
            return outcome, None
        return outcome, export(trainer.task, trainer.data, path, trainer.output / "model")


def export(task: Task, data: TextData, checkpoint: Path, folder: Path) -> Path:
    """Write the weights of a checkpoint as a model of transformers, with its tokenizer.

    Raises:
        vision.errors.CheckpointError: it cannot be read, or the folder cannot be written.
    """
    state = reader.read(checkpoint)
    model: Any = task.build_model(data)
    reader.load_weights(model, state["ema"] or state["model"], checkpoint)
    model.config.use_cache = True
    for settings in (model.config, model.generation_config):
        settings.pad_token_id = data.tokenizer.eos_token_id
    try:
        with replacing_folder(folder) as new:
            model.save_pretrained(new)
            data.tokenizer.save_pretrained(new)
    except OSError as problem:
        text = f"cannot be written ({problem.strerror})"
        raise CheckpointError(folder, text, "Check its permissions and the disk", code="unwritable-file") from None
    return folder
