"""Components of networks: blocks, fusions, stems and heads. Importing the package registers them by name."""

from revnets.nn import blocks as blocks
from revnets.nn import fusions as fusions
from revnets.nn import stems_and_heads as stems_and_heads
