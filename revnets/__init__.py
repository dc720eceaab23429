"""Reversible columns: train networks with the exact gradients of ordinary backprop and a fraction of its memory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from revnets.config.errors import ConfigError, SpecError
from revnets.config.net_spec import ColumnsSpec, NetSpec, load_spec
from revnets.config.registry import register_block, register_fusion, register_head, register_stem
from revnets.engine.cell import Cell, FixedGain, Gain
from revnets.engine.columns import ReversibleColumns, ReversibleSequence
from revnets.engine.errors import ReconstructionError, ReplayError
from revnets.engine.graph import Graph, Node, wire
from revnets.engine.memory_mode import Memory, MemoryPolicy
from revnets.engine.replay.threads import is_replaying
from revnets.models.net import Net, build, build_columns
from revnets.nn import blocks as blocks

if TYPE_CHECKING:
    from revnets.analysis.audit import Audit, audit
    from revnets.engine.columns_group import ColumnsGroup, find_columns
    from revnets.engine.drift import DriftWarning, predict_drift
    from revnets.memory.auto_budget import keep_budget
    from revnets.models.plan import Plan, PlanError, plan
    from revnets.pretrained.blend_schedule import BlendSchedule
    from revnets.pretrained.rewiring import make_reversible, undo_reversible

__version__ = "0.2.0"

__all__ = [
    "Audit",
    "BlendSchedule",
    "Cell",
    "ColumnsGroup",
    "ColumnsSpec",
    "ConfigError",
    "DriftWarning",
    "FixedGain",
    "Gain",
    "Graph",
    "Memory",
    "MemoryPolicy",
    "Net",
    "NetSpec",
    "Node",
    "Plan",
    "PlanError",
    "ReconstructionError",
    "ReplayError",
    "ReversibleColumns",
    "ReversibleSequence",
    "SpecError",
    "audit",
    "build",
    "build_columns",
    "find_columns",
    "is_replaying",
    "keep_budget",
    "load_spec",
    "make_reversible",
    "plan",
    "predict_drift",
    "register_block",
    "register_fusion",
    "register_head",
    "register_stem",
    "undo_reversible",
    "wire",
]

_LAZY = {
    "Audit": "revnets.analysis.audit",
    "audit": "revnets.analysis.audit",
    "ColumnsGroup": "revnets.engine.columns_group",
    "find_columns": "revnets.engine.columns_group",
    "DriftWarning": "revnets.engine.drift",
    "predict_drift": "revnets.engine.drift",
    "keep_budget": "revnets.memory.auto_budget",
    "Plan": "revnets.models.plan",
    "PlanError": "revnets.models.plan",
    "plan": "revnets.models.plan",
    "BlendSchedule": "revnets.pretrained.blend_schedule",
    "make_reversible": "revnets.pretrained.rewiring",
    "undo_reversible": "revnets.pretrained.rewiring",
}
"""Names whose module is imported on first use: building and training a network does not need it."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
