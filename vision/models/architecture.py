"""A network of reversible columns with the interface of a timm model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from timm.layers import NormMlpClassifierHead
from timm.models import register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from revnets import ReversibleColumns, build_columns, keep_budget
from revnets.config.errors import ArgumentError
from revnets.config.memory_budget import BudgetSpec
from revnets.config.net_spec import NetSpec
from revnets.memory.auto_budget import plan_on_call
from revnets.models.net import build_stem
from revnets.nn.blocks import init_weights

register_notrace_module(ReversibleColumns)  # a leaf for torch.fx, which cannot trace sizes and tapes


class RevCol(nn.Module):
    """Reversible columns for images (Cai et al., "Reversible Column Networks", ICLR 2023) as a timm model.

    States are (B, H, W, C). All outputs are (B, C, H, W) views of them, in channels_last memory. The features are the
    levels of the last column.

    Args:
        spec: Specification of stem and columns. The head is timm's, and `forward_intermediates` replaces `taps`.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Channels of the images.
        global_pool: `avg`, `max`, or empty for none.
        drop_rate: Dropout rate before the classifier.
        head_init_scale: Scale of the initial weights of the classifier (0.001 for fine-tuning, appendix D.2).
        device: Device of the parameters; `meta` allocates no memory.
        dtype: dtype of the parameters.

    Raises:
        revnets.SpecError: If a component rejects an option.
    """

    pretrained_cfg: Any  # a mapping set by timm

    def __init__(
        self,
        spec: NetSpec,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        head_init_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.spec = spec
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = spec.levels[-1].dim
        self.head_init_scale = head_init_scale
        with nullcontext() if device is None else torch.device(device):
            self.stem: nn.Module = build_stem(spec, in_chans=in_chans)
            self.columns: ReversibleColumns = build_columns(spec)
            self.head = classifier(self.num_features, num_classes, global_pool, drop_rate)
        self.scale_classifier()
        if dtype is not None:
            self.to(dtype=dtype)
        if isinstance(spec.memory, BudgetSpec):
            keep_budget(self, spec.memory)
        patch, last = spec.stem.options.get("patch", 4), spec.columns - 1
        self.feature_info = [
            {"num_chs": level.dim, "reduction": patch * reduction, "module": f"columns.cells.{last}.{index}"}
            for index, (level, reduction) in enumerate(zip(spec.levels, spec.reductions(), strict=True))
        ]

    def scale_classifier(self) -> None:
        """Multiply the weights of a new classifier by `head_init_scale`."""
        for parameter in self.head.fc.parameters():
            parameter.data.mul_(self.head_init_scale)

    @property
    def global_pool(self) -> str:
        """`avg`, `max`, or empty for none."""
        return self.head.global_pool.pool_type

    @property
    def levels(self) -> int:
        """Number of levels of the last column, without pruned ones."""
        graph = self.columns.graph
        return len(graph.states_of(graph.columns - 1))

    @property
    def _ends_down(self) -> bool:
        """Whether the last column runs from its top level down, so that the lowest requested level comes last."""
        graph = self.columns.graph
        return graph.is_down(graph.columns - 1)

    def twin(self) -> RevCol:
        """Return a copy without values on the meta device, with the same frozen parameters."""
        scalars = {"num_classes": self.num_classes, "in_chans": self.in_chans, "drop_rate": self.drop_rate}
        other = RevCol(self.spec, global_pool=self.global_pool, device="meta", **scalars)
        if self.levels < other.levels:
            other.prune_intermediate_layers([self.levels - 1])
            other.reset_classifier(self.num_classes, self.global_pool)
        for name, parameter in self.named_parameters():
            other.get_parameter(name).requires_grad_(parameter.requires_grad)
        return other

    # --------------------------------------------------------------------------------------------------- forward

    @plan_on_call
    def forward_features(self, x: Tensor) -> Tensor:
        """Return the top level of the last column, (B, num_features, H / 32, W / 32), of images (B, in_chans, H, W)."""
        return to_nchw(self.columns(self.stem(x))[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (B, num_classes) of features (B, num_features, H, W), or the input of the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @plan_on_call
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the top level of the last column, and a list of levels of the last column.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Indices of the levels; an integer n for the last n levels, None for all.
            norm: Ignored, because RevCol has no norm before its pooling.
            stop_early: Do not compute the levels of the last column after the last requested one: those above the
                highest, or below the lowest if the column runs down.
            output_fmt: `NCHW` or `NHWC`.
            intermediates_only: Return only the list of levels.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            problem = f"output_fmt is {output_fmt!r}, but must be NCHW or NHWC"
            raise ArgumentError(problem, "output_fmt", code="unknown-choice")
        take, highest = feature_take_indices(self.levels, indices)
        kept = (self.levels - min(take) if self._ends_down else highest + 1) if stop_early else self.levels
        stop = len(self.columns.graph.nodes) - self.levels + kept
        levels = self.columns(self.stem(x), stop=stop)[-kept:]  # the window begins with earlier states
        lowest = self.levels - kept if self._ends_down else 0
        out = [levels[index - lowest] if output_fmt == "NHWC" else to_nchw(levels[index - lowest]) for index in take]
        return out if intermediates_only else (to_nchw(levels[-1]), out)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates(indices=...)` does not need, and return the indices of the kept levels.

        Cells above the highest level of the last column are removed. Cells of earlier columns that no kept level
        depends on stay in the sequence but are frozen, so that every trainable parameter gets a gradient. If the last
        column runs down, no cell is removed; those below the lowest level are frozen, and levels keep their indices.
        """
        take, highest = feature_take_indices(self.levels, indices)
        if self._ends_down:
            freeze_idle(self.columns, self.levels - min(take), self.levels)
        pruned = highest < self.levels - 1 and not self._ends_down
        if pruned:
            self.columns = self.columns.truncated(len(self.columns.graph.nodes) - self.levels + highest + 1)
            freeze_idle(self.columns, highest + 1)
            self.num_features = self.head_hidden_size = self.feature_info[highest]["num_chs"]
        if prune_head or pruned:
            self.head.reset(0, "", reset_other=True, in_features=self.num_features)
            self.num_classes = 0
        return take

    def __prepare_scriptable__(self) -> nn.Module:
        raise TypeError(
            "TorchScript does not support RevCol, whose connections are dynamic. Use torch.export or torch.jit.trace"
        )

    # --------------------------------------------------------------------------------------------------- weights

    def load_pretrained(self, path: str) -> None:
        """Load weights from a file in this project's layout or the official one, which timm's loader rejects.

        timm calls this method with the downloaded file. Classifiers and first convolutions of other sizes are adapted
        as in timm. Their sizes are read from the file, not from `pretrained_cfg`.

        Raises:
            vision.errors.CheckpointError: If the file is unusable or belongs to another model.
        """
        from vision.weights.pretrained import load_file  # imports this class, and training does not need it

        load_file(self, path)

    # ------------------------------------------------------------------------------------------------ classifier

    def get_classifier(self) -> nn.Module:
        """Return the last Linear layer; an Identity if num_classes is 0."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier with a new one."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head.fc.apply(init_weights)
        self.scale_classifier()

    # -------------------------------------------------------------------------------------------------- training

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set the memory mode to `store` if disabled, or to `exact` if enabled and all columns are in mode `store`.

        New models use `exact` by default.
        """
        if not enable:
            self.columns.memory, self.columns.stored = "store", 0
        elif set(self.columns.memory) == {"store"}:
            self.columns.memory = "exact"

    def no_weight_decay(self) -> set[str]:
        """Return the names of gains, position embeddings, constant inputs of columns, and attention temperatures."""
        endings = ("gain.weight", "pos_embed", "fusion.constant", "logit_scale")
        return {name for name, _ in self.named_parameters() if name.endswith(endings)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return parameter groups for layer-wise learning rate decay, by depth in the grid of columns and blocks.

        The stem is group 0. Block b of column j, both counted from 0, is in group b + j + 1. A fusion is in the group
        of the first block of its level, a gain in that of the first block of its column, as in the official release.
        Coarse groups are the columns.
        """
        if coarse:
            return {"stem": r"^stem", "blocks": r"^columns\.cells\.(\d+)"}
        places: dict[int, list[str]] = {}
        for column in range(self.columns.graph.columns):
            first, levels = 0, list(enumerate(self.spec.levels))
            for level, spec in levels[::-1] if self.columns.graph.is_down(column) else levels:
                cell = rf"{column}\.{level}\."
                places.setdefault(column + 1, []).append(cell + "gain")
                places.setdefault(column + first + 1, []).append(cell + r"function\.fusion")
                for block in range(spec.depth):
                    name = cell + rf"function\.blocks\.{block}\."
                    places.setdefault(column + first + block + 1, []).append(name)
                first += spec.depth
        blocks = [(rf"^columns\.cells\.(?:{'|'.join(names)})", (group,)) for group, names in sorted(places.items())]
        return {"stem": r"^stem", "blocks": blocks}


def classifier(dim: int, num_classes: int, global_pool: str = "avg", drop_rate: float = 0.0) -> NormMlpClassifierHead:
    """Build a head of pooling, LayerNorm, dropout and Linear: (B, dim, H, W) to (B, num_classes)."""
    head = NormMlpClassifierHead(dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer="layernorm2d")
    head.fc.apply(init_weights)
    return head


def to_nchw(x: Tensor) -> Tensor:
    """Return a view (B, C, H, W) of x (B, H, W, C), in channels_last memory."""
    return x.permute(0, 3, 1, 2)


def freeze_idle(columns: ReversibleColumns, levels: int, last: int | None = None) -> None:
    """Freeze the cells that the first `levels` of the last `last` states do not depend on.

    Args:
        columns: The columns, which are modified.
        levels: Number of needed states.
        last: Number of states from which to count; `levels` by default.
    """
    nodes = columns.graph.nodes
    start = len(nodes) - (last or levels)
    needed = {node.index for node in nodes[start : start + levels]}
    for node in reversed(nodes):
        if node.index in needed:
            needed.update(node.reads if node.residual is None else (*node.reads, node.residual))
        else:
            columns.flat()[node.index].requires_grad_(False)
