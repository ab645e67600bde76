"""Published methods of mixed and switchable precision on the same ground as the dial, to compare it with."""

from comparison import trained as _trained  # noqa: F401  (registers the methods that train)
from comparison import whole_widths as _whole_widths  # noqa: F401  (registers ERQ-, IGQ-ViT- and QDrop-like)
from comparison.budget import average_bits, low_share
from comparison.ground import Ground, Settings
from comparison.methods import METHODS, Built, Method, Point, build, build_all, get_method
from comparison.switching import Switching
from comparison.training import Training

__all__ = [
    "METHODS", "Built", "Ground", "Method", "Point", "Settings", "Switching", "Training", "average_bits", "build", "build_all",
    "get_method", "low_share",
]  # fmt: skip
