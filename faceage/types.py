"""The values that the stages exchange: frames and faces.

Convention: pixel centres are at integers, the origin is the centre of the top-left pixel, x points
right and y down. Left and right are the viewer's. Ages are in years.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, Union

import numpy as np
import numpy.typing as npt

from faceage.errors import ShapeError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
HostPlane = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Plane = Union[HostPlane, "Tensor"]
"""The samples of one plane, where the frame lives: a numpy array, or a tensor that torch has on some device."""
Samples = Union[FloatArray, "Tensor"]
"""float32 values that were read from planes, on the frames' own device."""

Rect = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels or samples; x1 and y1 lie outside."""

Dark = Union[tuple[float, float], "tuple[Tensor, Tensor]"]
"""See `Change.dark`."""

Matrix = Literal["rgb", "bt601", "bt709", "bt2020", "smpte240m"]
ChromaSiting = Literal["left", "center", "topleft"]


@dataclass(frozen=True)
class PlaneLayout:
    """What one plane of a pixel format holds."""

    components: str
    """Its interleaved components, in order: "Y", "U", "V", "UV", "RGB", "RGBA", ..."""
    sub_x: int = 1
    """Horizontal subsampling: luma samples per sample of this plane."""
    sub_y: int = 1
    """Vertical subsampling."""


@dataclass(frozen=True)
class PixelLayout:
    """How the samples of a pixel format lie in memory."""

    planes: tuple[PlaneLayout, ...]
    bit_depth: int = 8
    shift: int = 0
    """Low bits of each sample that are unused: 6 for P010, whose ten bits are the high ones."""

    @property
    def dtype(self) -> np.dtype:
        """uint8 up to 8 bits, uint16 above."""
        return np.dtype(np.uint8 if self.bit_depth <= 8 else np.uint16)


def _planar(sub_x: int, sub_y: int, bit_depth: int = 8) -> PixelLayout:
    chroma = (PlaneLayout("U", sub_x, sub_y), PlaneLayout("V", sub_x, sub_y))
    return PixelLayout((PlaneLayout("Y"), *chroma), bit_depth)


PIXEL_LAYOUTS: dict[str, PixelLayout] = {
    "yuv420p": _planar(2, 2),
    "yuvj420p": _planar(2, 2),
    "yuv422p": _planar(2, 1),
    "yuvj422p": _planar(2, 1),
    "yuv444p": _planar(1, 1),
    "yuvj444p": _planar(1, 1),
    "nv12": PixelLayout((PlaneLayout("Y"), PlaneLayout("UV", 2, 2))),
    "yuv420p10le": _planar(2, 2, 10),
    "yuv422p10le": _planar(2, 1, 10),
    "yuv444p10le": _planar(1, 1, 10),
    "yuv420p12le": _planar(2, 2, 12),
    "yuv422p12le": _planar(2, 1, 12),
    "yuv444p12le": _planar(1, 1, 12),
    "yuv440p": _planar(1, 2),
    "yuvj440p": _planar(1, 2),
    "yuv440p10le": _planar(1, 2, 10),
    "yuv440p12le": _planar(1, 2, 12),
    "yuv411p": _planar(4, 1),
    "yuvj411p": _planar(4, 1),
    "p010le": PixelLayout((PlaneLayout("Y"), PlaneLayout("UV", 2, 2)), 10, 6),
    "gray": PixelLayout((PlaneLayout("Y"),)),
    "gray10le": PixelLayout((PlaneLayout("Y"),), 10),
    "gray12le": PixelLayout((PlaneLayout("Y"),), 12),
    "gray16": PixelLayout((PlaneLayout("Y"),), 16),
    "rgb24": PixelLayout((PlaneLayout("RGB"),)),
    "rgba": PixelLayout((PlaneLayout("RGBA"),)),
    "rgb48": PixelLayout((PlaneLayout("RGB"),), 16),
    "rgba64": PixelLayout((PlaneLayout("RGBA"),), 16),
}
"""The pixel formats that faceage reads and writes in place: FFmpeg's names, and for stills the packed ones."""


@dataclass(frozen=True, kw_only=True)
class ColorSpec:
    """What the samples of a frame mean."""

    matrix: Matrix = "bt709"
    full_range: bool = False
    chroma_siting: ChromaSiting = "left"


RGB = ColorSpec(matrix="rgb", full_range=True, chroma_siting="center")
"""The colour of decoded stills."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One decoded picture in its native planes, as it is stored: no sample is converted or turned."""

    planes: tuple[Plane, ...]
    """One array or tensor a plane, all of one kind: [H, W], or [H, W, C] where components are interleaved. Rows may be
    padded (strided). What is written is what is here."""
    pixel_format: str
    color: ColorSpec
    rotation: int = 0
    """Degrees counter-clockwise by which a player turns the picture, a multiple of 90. Positions of faces are given in
    the picture as it is shown; `kernels.crop_to_plane` turns them."""
    pts: int = 0
    """Presentation time in units of `time_base`."""
    time_base: Fraction = Fraction(1)
    native: object = field(default=None, repr=False, compare=False)
    """The decoder's own frame, for the metadata that goes with it; only `faceage.media` looks inside."""
    ready: object = field(default=None, repr=False, compare=False)
    """The event on a GPU after which the samples are there, see `kernels.streams`; None: they are."""

    def __post_init__(self) -> None:
        if self.rotation % 90:
            raise ShapeError(f"a frame is turned by quarter turns, got {self.rotation} degrees")
        if self.pixel_format not in PIXEL_LAYOUTS:
            raise UnsupportedError(
                f"pixel format {self.pixel_format} is not one faceage can edit in place "
                f"({', '.join(PIXEL_LAYOUTS)}); convert the video to yuv420p or yuv420p10le first"
            )
        layout = self.layout
        if len(self.planes) != len(layout.planes):
            raise ShapeError(f"{self.pixel_format} has {len(layout.planes)} planes, got {len(self.planes)}")
        height, width = self.planes[0].shape[:2]
        for plane, spec in zip(self.planes, layout.planes, strict=True):
            want = (-(-height // spec.sub_y), -(-width // spec.sub_x))
            want += (len(spec.components),) if len(spec.components) > 1 else ()
            dtype = str(plane.dtype).removeprefix("torch.")
            if plane.shape != want or dtype != layout.dtype.name:
                raise ShapeError(
                    f"plane {spec.components} of {self.pixel_format} must be {layout.dtype} {want}, "
                    f"got {dtype} {tuple(plane.shape)}"
                )

    @property
    def layout(self) -> PixelLayout:
        """The memory layout of the pixel format."""
        return PIXEL_LAYOUTS[self.pixel_format]

    @property
    def device(self) -> str:
        """Where the planes lie: "cpu", also for arrays, or "cuda:N"."""
        return str(self.planes[0].device)

    @property
    def is_array(self) -> bool:
        """Whether the planes are numpy arrays; else they are tensors."""
        return isinstance(self.planes[0], np.ndarray)

    @property
    def width(self) -> int:
        """Width in luma samples, as the picture is shown."""
        return self.planes[0].shape[0 if self.rotation % 180 else 1]

    @property
    def height(self) -> int:
        """Height in luma samples, as the picture is shown."""
        return self.planes[0].shape[1 if self.rotation % 180 else 0]

    @property
    def time_s(self) -> float:
        """Presentation time in seconds."""
        return float(self.pts * self.time_base)


def enclosing(a: Rect, b: Rect) -> Rect:
    """Return the smallest rectangle with two others in it."""
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


@dataclass(frozen=True, kw_only=True)
class Change:
    """What ageing does to one face, in the pixels of an aligned crop: `kernels.apply_change` has the formula.

    The mask of the ager is in it: both parts are exactly 0 on the outer two pixels. Both are arrays, or both tensors.
    """

    delta: Samples
    """float32 [3, S, S], what is added to RGB in units of its [-1, 1] range (2 is black to white)."""
    gain: Samples | None = None
    """float32 [S, S], the relative change of the luma: -0.1 makes it a tenth darker; None: the luma is not scaled."""
    dark: Dark | None = None
    """Lumas in [0, 1] of a sample up to which its luma changes in full, and from which on not at all; None: all samples
    change. It needs a gain. Those that a device computed are tensors without dimensions."""
    part: Rect | None = None
    """The pixels of the crop outside of which it is 0, if that is known: only these are worked on. None: any may
    change."""
    kept: dict = field(default_factory=dict, init=False, repr=False, compare=False)
    """What `kernels.apply_change` made of it, for the next time that it is applied."""

    def __post_init__(self) -> None:
        size = self.delta.shape[-1]
        got = [part.shape for part in (self.delta, self.gain) if part is not None]
        if got != [(3, size, size), (size, size)][: len(got)]:
            raise ShapeError(f"expected a delta [3, S, S] and a gain [S, S] or None, got {' and '.join(map(str, got))}")

    @property
    def size_px(self) -> int:
        """S, the side of the crop."""
        return int(self.delta.shape[-1])

    def scaled(self, weight: float) -> Change:
        """Return the share `weight` of the change, in [0, 1]."""
        if weight == 1:
            return self
        gain = None if self.gain is None else self.gain * weight
        return Change(delta=self.delta * weight, gain=gain, dark=self.dark, part=self.part)

    def plus(self, other: Change) -> Change:
        """Return the sum of two changes of one face, which are meant for the same samples."""
        assert (self.dark is None) == (other.dark is None), "changes for other samples"
        gains = [change.gain for change in (self, other) if change.gain is not None]
        gain = sum(gains[1:], gains[0]) if gains else None
        part = None if self.part is None or other.part is None else enclosing(self.part, other.part)
        return Change(delta=self.delta + other.delta, gain=gain, dark=self.dark, part=part)


@dataclass(frozen=True)
class View:
    """A way of framing a face: which crop an ager wants of it."""

    name: str
    """"face" or "head", a key of `geometry.TEMPLATES`."""
    template: FloatArray
    """float32 [5, 2], where the crop has the face's landmarks, as fractions of its side."""
    sizes_px: tuple[int, ...]
    """Sides of the crops that there are, ascending; see `align.choose_size`."""


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Faces in one view, in crops of one size: `align.prepare_views` makes them. F may be 0."""

    pixels: Samples
    """float32 [F, 3, S, S], RGB in [-1, 1], aligned; where the faces' frames live."""
    landmarks: FloatArray
    """float32 [F, 5, 2], the faces' own, in crop pixels: near the view's template, but not on it."""
    frame_to_crop: FloatArray
    """float32 [F, 2, 3], frame pixels to crop pixels."""

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: slice | npt.NDArray) -> Crops:
        """Return the faces that `rows` (a slice, a mask or an index array) selects."""
        return Crops(pixels=self.pixels[rows], landmarks=self.landmarks[rows], frame_to_crop=self.frame_to_crop[rows])

    @classmethod
    def empty(cls, size_px: int) -> Crops:
        """Return no face."""
        return cls(
            pixels=np.zeros((0, 3, size_px, size_px), np.float32),
            landmarks=np.zeros((0, 5, 2), np.float32),
            frame_to_crop=np.zeros((0, 2, 3), np.float32),
        )

    @property
    def size_px(self) -> int:
        """S, the side of the crops."""
        return int(self.pixels.shape[-1])


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """How a person looks before anything is changed, measured over the samples of a shot, whatever the ager."""

    embedding: FloatArray
    """float32 [D], unit length: the mean of the identity network's embeddings."""
    thumbnail: FloatArray
    """float32 [3, 16, 16], RGB in [-1, 1]: the mean of the aligned faces, reduced by area."""


@dataclass(frozen=True, kw_only=True)
class Faces:
    """Every face of a batch of frames, as a struct of arrays. No face at all (F = 0) is a normal value."""

    frame_index: IntArray
    """int64 [F], the position of the face's frame in the batch."""
    boxes: FloatArray
    """float32 [F, 4], x0 y0 x1 y1 in frame pixels."""
    landmarks: FloatArray
    """float32 [F, 5, 2], frame pixels, ordered as `geometry.LANDMARKS_5`."""
    scores: FloatArray
    """float32 [F], the detector's confidence in [0, 1]."""

    def __post_init__(self) -> None:
        count = len(self.frame_index)
        shapes = {"boxes": (count, 4), "landmarks": (count, 5, 2), "scores": (count,)}
        for name, want in shapes.items():
            got = getattr(self, name)
            if got.shape != want or got.dtype != np.float32:
                raise ShapeError(f"{name} must be float32 {want}, got {got.dtype} {got.shape}")

    def __len__(self) -> int:
        return len(self.frame_index)

    def __getitem__(self, rows: slice | npt.NDArray) -> Faces:
        """Return the faces that `rows` (a slice, a mask or an index array) selects."""
        return Faces(
            frame_index=self.frame_index[rows],
            boxes=self.boxes[rows],
            landmarks=self.landmarks[rows],
            scores=self.scores[rows],
        )

    @classmethod
    def empty(cls) -> Faces:
        """Return no face."""
        return cls(
            frame_index=np.zeros(0, np.int64),
            boxes=np.zeros((0, 4), np.float32),
            landmarks=np.zeros((0, 5, 2), np.float32),
            scores=np.zeros(0, np.float32),
        )

    @classmethod
    def concatenate(cls, parts: list[Faces]) -> Faces:
        """Return the faces of all `parts`, in order; frame indices are kept as they are."""
        if not parts:
            return cls.empty()
        return cls(
            frame_index=np.concatenate([p.frame_index for p in parts]),
            boxes=np.concatenate([p.boxes for p in parts]),
            landmarks=np.concatenate([p.landmarks for p in parts]),
            scores=np.concatenate([p.scores for p in parts]),
        )
