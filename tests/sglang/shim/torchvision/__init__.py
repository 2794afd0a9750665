"""torchvision, as a stand-in: sglang imports it for image models, and its pip package would replace torch."""

import enum
import importlib

from _stand_in import Submodules, stand_in


class InterpolationMode(enum.Enum):
    """Its members become default arguments when sglang is imported."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


__version__ = "0.0.0+stand.in"
__getattr__ = stand_in(__name__)
Submodules(__name__, {"InterpolationMode": InterpolationMode})
for _name in ("transforms", "io"):
    importlib.import_module(f"{__name__}.{_name}")
