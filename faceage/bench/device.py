"""What a run on a GPU is measured against: the decoder and the encoder alone, and the ways that others take.

- decode: NVDEC, and nothing else. encode: NVENC, of frames that lie on the GPU already.
- eager: the same product with eager torch in fp32 and the PyTorch references of the kernels, looking for faces in every
  frame.
- whole frames: the algorithm of FaceFusion's age modifier, written anew from a reading of it: every frame as a whole on
  the CPU, every face alone through a U-Net of FRAN's size (of random weights) at 1024 pixels in fp32, blended by copies
  of the whole frame in float64. It shares our decoder, detector and encoder, so it is faster than the original.
"""

from __future__ import annotations

import functools
import itertools
import os
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, cast

import cv2
import numpy as np

from faceage.align import align_faces
from faceage.bench.runs import Load
from faceage.engines.base import Runtime
from faceage.engines.registry import BACKENDS
from faceage.geometry import invert_affine
from faceage.media.planes import read_only_planes, to_native
from faceage.media.video import EncodeOptions, VideoReader, VideoWriter
from faceage.pipeline.request import AgeRequest, Networks
from faceage.pipeline.video import age_video
from faceage.track import TrackConfig
from faceage.types import RGB, FloatArray, Frame

if TYPE_CHECKING:
    from torch import Tensor, nn

HELD_FRAMES = 240
"""Frames that are encoded: 0.7 GB of 1080p on the GPU."""
WHOLE_FRAME_CROP_PX = 1024
WHOLE_FRAME_WIDTHS = (64, 128, 256, 512, 1024)
"""Channels of the levels of FRAN's U-Net."""
BLUR = 0.3
"""Width of the rim of the mask that fades, over the crop's side."""


def decode_alone(clip: Path, device: str) -> dict:
    """Decode a video to a device."""
    start = perf_counter()
    with VideoReader(clip, device=device) as reader:
        frames = sum(1 for _ in reader)
    return _speed(frames, start)


def encode_alone(clip: Path, target: Path, encode: EncodeOptions, device: str) -> dict:
    """Encode the first frames of a video, which lie on a device already."""
    with VideoReader(clip, device=device) as reader, VideoWriter(target, reader, encode) as writer:
        frames = list(itertools.islice(reader, HELD_FRAMES))
        start = perf_counter()
        for frame in frames:
            writer.write(frame)
        writer.cut()
        return _speed(len(frames), start)


def eager(load: Load, clip: Path, target: Path, request: AgeRequest, encode: EncodeOptions) -> dict:
    """Age a video with eager torch; it runs in a process of its own, whose environment it changes."""
    os.environ["FACEAGE_KERNELS"] = "ref"
    networks = _eager_networks(load)
    report = age_video(networks, clip, target, request, encode=encode, track=TrackConfig(detect_every=1))
    return {"frames": report.frames, "seconds": report.seconds, "fps": report.frames / report.seconds}


def _eager_networks(load: Load) -> Networks:
    assert isinstance(load, functools.partial)  # of load_networks
    runtime: Runtime = load.keywords["runtime"]
    networks = load(runtime=replace(runtime, backend=BACKENDS["torch"], precision="fp32"))
    return replace(networks, device=runtime.device)


def whole_frames(
    load: Load, clip: Path, target: Path, encode: EncodeOptions, device: str, crop_px: int = WHOLE_FRAME_CROP_PX
) -> dict:
    """Change the faces of a video as FaceFusion does."""
    networks = load()
    network = _fran(device)
    start = perf_counter()
    with VideoReader(clip) as reader, VideoWriter(target, reader, encode) as writer:
        for frame in reader:
            picture = to_native(frame).to_ndarray(format="rgb24")
            faces = networks.detector.detect([Frame(planes=(picture,), pixel_format="rgb24", color=RGB)])
            for landmarks in faces.landmarks:
                picture = _replace_face(network, picture, landmarks, crop_px)
            changed = to_native(Frame(planes=(picture,), pixel_format="rgb24", color=RGB))
            planes = read_only_planes(changed.reformat(format=frame.pixel_format), frame.pixel_format)
            writer.write(replace(frame, planes=planes, native=None))
        return _speed(writer.frames_written, start)


def _replace_face(network: nn.Module, picture: np.ndarray, landmarks: FloatArray, crop_px: int) -> np.ndarray:
    """Return a copy of the whole picture with one face changed, in float64 as there."""
    import torch

    (matrix,) = align_faces(landmarks[None], crop_px)
    crop = cv2.warpAffine(picture, matrix, (crop_px, crop_px), borderMode=cv2.BORDER_REPLICATE, flags=cv2.INTER_AREA)
    values = np.concatenate([crop / 255.0, np.full((crop_px, crop_px, 2), 0.5)], -1)
    device = next(network.parameters()).device
    face = torch.from_numpy(values.transpose(2, 0, 1)[None].astype(np.float32)).to(device)
    with torch.inference_mode():
        delta = network(face)[0].cpu().numpy()
    after = np.clip(crop / 255.0 + delta.transpose(1, 2, 0), 0, 1) * 255.0
    mask = np.zeros((crop_px, crop_px), np.float32)
    rim = max(int(BLUR * crop_px / 2), 1)
    mask[rim:-rim, rim:-rim] = 1
    mask = cv2.GaussianBlur(mask, (0, 0), rim / 4)  # for every face of every frame
    size = picture.shape[1::-1]
    back = invert_affine(matrix)
    placed = cv2.warpAffine(after, back, size, borderMode=cv2.BORDER_REPLICATE)
    weight = cv2.warpAffine(mask, back, size)[..., None].astype(np.float64)
    return (picture * (1 - weight) + placed * weight).astype(np.uint8)


def _fran(device: str) -> nn.Module:
    """Return a U-Net of FRAN's size, of random weights: 746 GMAC a face of 1024 pixels; FRAN's has 772."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Twice(nn.Sequential):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__(
                nn.Conv2d(inputs, outputs, 3, padding=1), nn.LeakyReLU(0.2),
                nn.Conv2d(outputs, outputs, 3, padding=1), nn.LeakyReLU(0.2),
            )  # fmt: skip

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = WHOLE_FRAME_WIDTHS
            self.first = Twice(5, widths[0])
            self.down = nn.ModuleList(Twice(a, b) for a, b in itertools.pairwise(widths))
            self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in itertools.pairwise(widths))
            self.join = nn.ModuleList(Twice(2 * a, a) for a in widths[:-1])
            self.last = nn.Conv2d(widths[0], 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            skips = [self.first(x)]
            for down in self.down:
                skips.append(down(F.max_pool2d(skips[-1], 2)))
            x = skips.pop()
            for up, join in zip(reversed(self.up), reversed(self.join), strict=True):
                x = F.interpolate(up(x), scale_factor=2, mode="bilinear")
                x = join(torch.cat([skips.pop(), x], 1))
            return cast("Tensor", self.last(x))

    torch.manual_seed(0)
    return UNet().eval().to(device)


def _speed(frames: int, start: float) -> dict:
    seconds = perf_counter() - start
    return {"frames": frames, "seconds": seconds, "fps": frames / seconds}
