"""Makes trained networks reversible for fine-tuning."""

from revnets.pretrained.blend_schedule import BlendSchedule
from revnets.pretrained.rewiring import make_reversible, undo_reversible

__all__ = ["BlendSchedule", "make_reversible", "undo_reversible"]
