"""Lost bits: the rounding residual of the coupling x_t = F_t + gamma * x_{t-m}, which makes its inverse exact.

The forward pass has both x_{t-m} and its reconstruction (x_t - F_t) / gamma. It keeps their difference d as integers,
between the bit patterns. Integer subtraction wraps around and integer addition undoes it, so every value is restored
bit for bit, including denormals, -0.0, infinities and NaN payloads.

x_t, the reconstruction and gamma bound the size of d (`rounding.py`), and backward has all three. So every element
gets a bit field whose width need not be stored (`fields.py`).

Storing the rounding of a reversible step goes back to Maclaurin et al., "Gradient-based Hyperparameter Optimization
through Reversible Learning" (ICML 2015), for momentum in fixed point, and MacKay et al., "Reversible Recurrent Neural
Networks" (NeurIPS 2018), for hidden states in fixed point.
"""

from revnets.engine.lost_bits.coding import LostBits, assumed, encode
from revnets.engine.lost_bits.rounding import bits_of, expected_bytes

__all__ = ["LostBits", "assumed", "bits_of", "encode", "expected_bytes"]
