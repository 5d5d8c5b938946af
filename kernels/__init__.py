"""Pixel operations: read aligned crops out of native planes, and apply a change to them.

Each file has its formula, a PyTorch reference (`*_ref`) and a fast implementation. Nothing here imports
torch before a reference is called.
"""

from faceage.kernels.apply_change import BLACK_OFFSET, RGB_LUMA, Rect, apply_change, change_crop
from faceage.kernels.color import color_of, rgb_to_yuv_delta, yuv_to_rgb
from faceage.kernels.gather import gather_crops, gather_crops_ref

__all__ = [
    "BLACK_OFFSET",
    "RGB_LUMA",
    "Rect",
    "apply_change",
    "change_crop",
    "color_of",
    "gather_crops",
    "gather_crops_ref",
    "rgb_to_yuv_delta",
    "yuv_to_rgb",
]
