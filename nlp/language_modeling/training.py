"""Language modeling as a task of the trainer in `vision.training`, and the command `revnets train-lm`.

The trainer is independent of images: a task provides data, a model, a loss and metrics. No other module of `nlp`
imports `vision`.

Shapes: B sequences of L tokens.
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
from revnets.config.overrides import apply_overrides, set_value
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
    """A tokenizer of byte pairs that is learned from the training text.

    Attributes:
        pairs: Size of the vocabulary, including all bytes and the end of a document.
    """

    pairs: int = Field(gt=BYTES + 1, le=2**20)


class TextConfig(Strict):
    """The text of a run, its tokenizer and the length of its sequences.

    Attributes:
        train: Training text.
        val: Share of the documents to hold out, or another text.
        tokenizer: `bytes`; byte pairs to learn; or a directory, or a name on the Hub.
        length: Tokens of a sequence.
    """

    train: Files
    val: Annotated[float, Field(gt=0, lt=1)] | Files = 0.05
    tokenizer: str | PairsConfig = "bytes"
    length: int = Field(default=256, ge=2, le=2**24)


@dataclass(frozen=True, slots=True)
class TextData:
    """The data of a run.

    Attributes:
        train: Training sequences.
        val: Validation sequences.
        tokenizer: Their tokenizer.
        val_bytes: UTF-8 bytes of the validation documents.
        unreadable: Record of corrupt samples that the trainer expects; always empty.
    """

    train: PackedText
    val: PackedText
    tokenizer: Any
    val_bytes: int
    unreadable: Unreadable = field(default_factory=Unreadable)


class LanguageModeling(Task):
    """Prediction of the next token in packed sequences. A batch is `input_ids` and `labels`, (B, L) each.

    The metric is bits per byte, which is comparable between tokenizers: the total loss of the held-out tokens in bits,
    divided by the bytes of their text.

    Args:
        config: Configuration of the run.
        train: See `TextConfig`.
        val: See `TextConfig`.
        tokenizer: See `TextConfig`.
        length: See `TextConfig`.

    Raises:
        revnets.SpecError: If an argument is invalid.
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

        Args:
            notes: Ignored.
            world: Ignored.

        Raises:
            revnets.SpecError: If the text cannot be read, or is too short.
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
            raise error("tokenizer", f"{name} has no end-of-text token", "Set its eos_token", "missing-key")
        return tokenizer

    def padding(self, sample: Sample) -> Sample:
        """Return a copy of a sample that no evaluation counts."""
        return uncounted(sample)

    def batch_size(self, batch: Mapping[str, Tensor]) -> int:
        """Return the number of tokens, the unit of the log."""
        return batch["input_ids"].numel()

    def metadata(self, data: TextData) -> dict[str, Any]:
        """Return the sizes of the text for checkpoints."""
        return {"tokens": len(data.train.tokens), "val_bytes": data.val_bytes}

    def input_shape(self, data: TextData) -> tuple[int, ...]:
        """Return the shape (L,) of a sequence."""
        return (self.source.length,)

    # ------------------------------------------------------------------------------------------------------ model

    def build_model(self, data: TextData) -> nn.Module:
        """Build the model of the key `model`, for the vocabulary and the length of the text.

        Raises:
            revnets.SpecError: If it is not a language model, or if its vocabulary or length is too small.
        """
        given = self.config.model
        if not isinstance(given, TransformersModel):
            remedy = "Use {hf: revcol_lm, hidden_size: 256, ...}, or the type of another model, such as gpt2"
            raise SpecError("training run", "model", "not a language model", remedy, code="wrong-type")
        tokens, end = len(data.tokenizer), data.tokenizer.eos_token_id
        sizes = {"vocab_size": tokens, "max_position_embeddings": self.source.length}
        for key, least in sizes.items():
            value = given.options.get(key)
            if isinstance(value, int) and value < least:
                problem = f"{value:,} is too small: the text needs {least:,}"
                raise SpecError("training run", f"model.{key}", problem, "Remove the key", code="conflicting-values")
        # no padding token: many models never train its embedding, and here it would be the end of a text
        ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
        return create_model(self.config, **sizes, **ends)

    def planned(self, model: nn.Module) -> nn.Module:
        """Return the module whose memory is planned."""
        return NextTokenLoss(model)

    # ------------------------------------------------------------------------------------------- loss and metrics

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute the mean loss of a batch in nats per token."""
        return model(**batch).loss

    def predict(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute the mean loss of a batch in nats per token, without logits if the model supports it."""
        return model(**batch, **self._options).loss

    def evaluator(self, model: nn.Module, data: TextData, device: torch.device) -> BitsPerByte:
        """Create the metric."""
        return BitsPerByte(data.val_bytes, device)

    @property
    def _options(self) -> dict[str, Any]:
        own = cast(TransformersModel, self.config.model).hf == RevColLMConfig.model_type
        return {"skip_logits": True} if own else {}


class NextTokenLoss(nn.Module):
    """A language model from tokens (B, L) to its loss, for copies on fake tensors.

    Args:
        model: Language model of transformers.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the mean loss of tokens (B, L)."""
        tokens = tokens.long()
        return self.model(input_ids=tokens, labels=tokens).loss


class BitsPerByte:
    """Loss of held-out text in nats per token and bits per byte.

    Args:
        count: Bytes of the whole text.
        device: Device of the model.
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
        """Compute `loss` and `bits_per_byte` over the text of all processes."""
        if world.size > 1:
            dist.all_reduce(self.sums)
        nats, tokens = self.sums.tolist()
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / self.bytes}


def load_language_run(source: Source, overrides: Sequence[str] = ()) -> TrainConfig:
    """Load a run configuration of `revnets train-lm`: that of `revnets train`, with the task defined by the key `text`.

    Args:
        source: YAML file, or a mapping.
        overrides: Overrides as `key=value`.

    Raises:
        revnets.SpecError: If the configuration is invalid. The error names the file, key, value and hint.
    """
    layers = read_layers(source)
    apply_overrides(layers, overrides)
    if "text" in layers.data:
        text = layers.data.pop("text")
        if not isinstance(text, dict):
            raise SpecError(layers.name, "text", what(text), "Use a mapping, as in {train: texts}", code="wrong-type")
        set_value(layers, "task", {"type": f"{__name__}:{LanguageModeling.__name__}", **text})
    elif "task" not in layers.data:
        remedy = "Add it, as in `text: {train: texts}`"
        raise SpecError(layers.name, "text", "this key is missing", remedy, code="missing-key")
    return layers.check(TrainConfig, trust=True)


def train_language_model(config: TrainConfig) -> tuple[Outcome, Path | None]:
    """Train a model, and write its best weights to the directory `model` of the run in the format of transformers.

    Args:
        config: Configuration of the run.

    Returns:
        The outcome of the run, and the directory, or None if this process did not write it.

    Raises:
        vision.errors.TrainingError, vision.errors.CheckpointError, revnets.SpecError: See `Trainer`.
    """
    with joined(config.device) as world:
        trainer = Trainer(config, world=world)
        outcome = trainer.fit()
        path = outcome.best or outcome.last
        if outcome.signal is not None or path is None or not world.is_main:
            return outcome, None
        return outcome, export(trainer.task, trainer.data, path, trainer.output / "model")


def export(task: Task, data: TextData, checkpoint: Path, folder: Path) -> Path:
    """Write the weights of a checkpoint and the tokenizer in the format of transformers.

    Args:
        task: Task of the run.
        data: Data of the run.
        checkpoint: Checkpoint to read.
        folder: Directory to write.

    Returns:
        The directory.

    Raises:
        vision.errors.CheckpointError: If the checkpoint cannot be read, or the directory cannot be written.
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
        raise CheckpointError(
            folder, text, "Check its permissions and the disk space", code="unwritable-file"
        ) from None
    return folder
