"""The bits that x_t = F_t + gamma * x_{t-m} rounds away, packed small, so that the inverse is exact.

At forward time both x_{t-m} and its reconstruction (x_t - F_t) / gamma are at hand. Their difference d, taken between
the bit patterns read as integers, is kept. Integer subtraction wraps and is undone by integer addition, so every value
comes back bit for bit: denormals, -0.0, infinities and NaN payloads as well.

How large d can be follows from x_t, the reconstruction and gamma (`rounding.py`), which backward has too. So every
element gets a field of its own width, and no width is kept (`fields.py`).

Keeping what a reversible step rounds away goes back to Maclaurin et al., "Gradient-based Hyperparameter Optimization
through Reversible Learning" (ICML 2015), for momentum in fixed point, and MacKay et al., "Reversible Recurrent Neural
Networks" (NeurIPS 2018), for hidden states in fixed point.
"""

from revnets.engine.lost_bits.coding import LostBits, assumed, encode
from revnets.engine.lost_bits.rounding import bits_of, expected_bytes

__all__ = ["LostBits", "assumed", "bits_of", "encode", "expected_bytes"]
