"""Pixel operations: all that reads or writes the samples of a frame, where the frame lives.

Each file has its formula, a PyTorch reference for any device and a fast implementation for arrays; the Triton kernel of
an operation, where it has one, is in the file of the same name with `_triton`. Nothing here imports torch before a
frame of tensors or a reference is at hand, or Triton before a frame on a GPU is.
"""

from faceage.kernels.apply_change import BLACK_OFFSET, Rect, apply_change, change_crop
from faceage.kernels.area_means import AreaMeans
from faceage.kernels.candidates import Candidates, select_candidates
from faceage.kernels.color import RGB_LUMA, color_of, rgb_to_yuv_delta, yuv_to_rgb
from faceage.kernels.gather import gather_crops
from faceage.kernels.placement import cut_out
from faceage.kernels.streams import await_samples, computing, decoding, ready_event, settle
from faceage.kernels.thumbnail import Thumbnail, begin_thumbnail, luma_plane
from faceage.kernels.transfer import (
    all_to_host,
    begin_all_to_host,
    beside,
    clone_planes,
    download_planes,
    to_device,
    to_host,
    upload_planes,
)

__all__ = [
    "BLACK_OFFSET",
    "RGB_LUMA",
    "AreaMeans",
    "Candidates",
    "Rect",
    "Thumbnail",
    "all_to_host",
    "apply_change",
    "await_samples",
    "begin_all_to_host",
    "begin_thumbnail",
    "beside",
    "change_crop",
    "clone_planes",
    "color_of",
    "computing",
    "cut_out",
    "decoding",
    "download_planes",
    "gather_crops",
    "luma_plane",
    "ready_event",
    "rgb_to_yuv_delta",
    "select_candidates",
    "settle",
    "to_device",
    "to_host",
    "upload_planes",
    "yuv_to_rgb",
]
