"""Find faces and their five landmarks: MTCNN on native planes, batched over frames.

P-Net slides over a pyramid of downscaled pictures and proposes squares, R-Net rejects most of them at
24 pixels, O-Net decides at 48 and places the landmarks. Between full detections `Detector.refine` runs
O-Net alone on faces that are already known.

Convention: inside this module boxes are x0 y0 x1 y1 of edges, where pixel i covers [i, i + 1]; `Faces` has
them half a pixel less, with pixel centres at integers.

Reference: Zhang et al., "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional
Networks", 2016, arXiv:1604.02878.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt

from faceage.engines.base import Engine, Program
from faceage.engines.store import Backend, EngineStore
from faceage.kernels.color import color_of, yuv_to_rgb
from faceage.kernels.gather import gather_crops
from faceage.networks.mtcnn import (
    ONET_SIZE_PX,
    PNET_CELL_PX,
    PNET_MIN_PX,
    PNET_STRIDE_PX,
    RNET_SIZE_PX,
    onet_program,
    pnet_program,
    rnet_program,
)
from faceage.types import Faces, FloatArray, Frame, IntArray, Plane

MIN_EYE_DISTANCE_PX = 2.0
"""A face whose eyes are closer is dropped: nothing can be aligned by it."""

AUTO_MIN_FACE_PX = 24.0
AUTO_MIN_FACE_FRACTION = 0.025
"""The default smallest face, of the frame's shorter side: 27 pixels at 1080p."""

PIXEL_SCALE = 127.5 / 128
"""MTCNN was trained on (x - 127.5) / 128 of 8-bit values, where ours are in [-1, 1]."""

NMS_LEVEL_IOU = 0.5
NMS_IOU = 0.7
"""Overlap at which the weaker of two boxes goes: within a pyramid level, and after R- and O-Net."""

SEARCH_SIDE = 0.985
"""Side of the square that O-Net searches again, over the height of the box that it gave. It was trained on
squares about as high; with this factor 30 searches neither grow nor shrink boxes (median ratio 0.999)."""

REMAP_ROWS = 32_000
"""OpenCV remaps at most 32,767 rows at once."""


@dataclass(frozen=True, kw_only=True)
class DetectConfig:
    """What to look for."""

    min_face_px: float | None = None
    """Side of the smallest face in frame pixels, at least 12; None: 2.5 % of the shorter side, 24 or more."""
    max_picture_px: int = 1280
    """Longest side of the largest picture that P-Net sees; larger frames have a larger smallest face."""
    thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7)
    """Face probability in [0, 1] at which P-, R- and O-Net let a box pass."""
    pyramid_factor: float = 0.709
    """Scale from one pyramid level to the next, in [0.3, 0.83]."""
    max_batch: int = 256
    """Most crops in one call of R-Net or O-Net."""

    def __post_init__(self) -> None:
        if self.min_face_px is not None and not self.min_face_px >= PNET_CELL_PX:
            raise ValueError(f"min_face_px is {self.min_face_px}, must be at least {PNET_CELL_PX}")
        if self.max_picture_px < PNET_MIN_PX:
            raise ValueError(f"max_picture_px is {self.max_picture_px}, must be at least {PNET_MIN_PX}")
        if len(self.thresholds) != 3 or not all(0 <= t <= 1 for t in self.thresholds):
            raise ValueError(f"thresholds are {self.thresholds}, must be three numbers in [0, 1]")
        if not 0.3 <= self.pyramid_factor <= 0.83:
            raise ValueError(f"pyramid_factor is {self.pyramid_factor}, must be in [0.3, 0.83]")
        if self.max_batch < 1:
            raise ValueError(f"max_batch is {self.max_batch}, must be at least 1")

    def smallest_face_px(self, width: int, height: int) -> float:
        """Return the side of the smallest face that is looked for in a frame of this size."""
        wanted = self.min_face_px
        if wanted is None:
            wanted = max(AUTO_MIN_FACE_PX, AUTO_MIN_FACE_FRACTION * min(width, height))
        return max(wanted, PNET_CELL_PX * max(width, height) / self.max_picture_px)


@dataclass(frozen=True)
class _Boxes:
    """Candidate boxes of a batch of frames."""

    frame: IntArray
    edges: FloatArray
    """float32 [K, 4], x0 y0 x1 y1 of edges."""
    scores: FloatArray

    def __getitem__(self, rows: npt.NDArray) -> _Boxes:
        return _Boxes(self.frame[rows], self.edges[rows], self.scores[rows])


@dataclass(frozen=True)
class _Level:
    """One size of all frames, in their native planes."""

    width: int
    height: int
    is_scanned: bool
    """Whether P-Net runs on it; R-Net alone reads the larger ones."""
    planes: list[list[Plane]]
    """Per frame; a plane is `width` x `height`, or its native size if that is smaller (chroma)."""


class Detector:
    """MTCNN. Calls are safe from several threads at once."""

    def __init__(self, pnet: Engine, rnet: Engine, onet: Engine, config: DetectConfig | None = None) -> None:
        """Use these engines of `networks.mtcnn`; `load_detector` loads them."""
        self.config = config or DetectConfig()
        self._pnet, self._rnet, self._onet = pnet, rnet, onet

    def detect(self, frames: Sequence[Frame]) -> Faces:
        """Find all faces. Frames of the same size run as one batch, so give as many as memory allows.

        Args:
            frames: frames of any sizes and pixel formats; none is a normal value.

        Returns:
            The faces, by frame and then by falling score. `frame_index` counts in `frames`. Boxes may reach
            over the frame's edge.
        """
        sizes = np.array([(frame.width, frame.height) for frame in frames]).reshape(-1, 2)
        parts = []
        for size in np.unique(sizes, axis=0):
            index = np.flatnonzero((sizes == size).all(1))
            faces = self._detect_same_size([frames[i] for i in index.tolist()])
            parts.append(replace(faces, frame_index=index[faces.frame_index]))
        found = Faces.concatenate(parts)
        return found[np.lexsort((-found.scores, found.frame_index))]

    def refine(self, frames: Sequence[Frame], faces: Faces) -> Faces:
        """Look again at faces that are known from this or a neighbouring frame, with O-Net alone.

        The square to search is made from the last box so that repeated refinement stays where it is.

        Args:
            frames: frames of any sizes and pixel formats.
            faces: where the faces are about; `frame_index` counts in `frames`.

        Returns:
            One face per given one, in the same order. The score is O-Net's: low where there is no face any
            more, and 0 where no sensible landmarks came out (those given are kept then).
        """
        centre = (faces.boxes[:, :2] + faces.boxes[:, 2:] + 1) / 2
        half = np.maximum(SEARCH_SIDE * (faces.boxes[:, 3:] - faces.boxes[:, 1:2]), 1) / 2
        squares = _Boxes(faces.frame_index, np.concatenate([centre - half, centre + half], 1), faces.scores)
        found = self._decide(frames, squares)
        lost = ~_is_sensible(found.landmarks)
        return Faces(
            frame_index=faces.frame_index,
            boxes=np.where(lost[:, None], faces.boxes, found.boxes),
            landmarks=np.where(lost[:, None, None], faces.landmarks, found.landmarks),
            scores=np.where(lost, np.float32(0), found.scores),
        )

    def _detect_same_size(self, frames: list[Frame]) -> Faces:
        width, height = frames[0].width, frames[0].height
        smallest = self.config.smallest_face_px(width, height)
        if min(width, height) < smallest:
            return Faces.empty()
        levels = _pyramid(frames, smallest, self.config.pyramid_factor)
        boxes = self._propose(frames, levels)
        boxes = self._reject(frames, levels, boxes)
        faces = self._decide(frames, boxes)
        faces = faces[(faces.scores > self.config.thresholds[2]) & _is_sensible(faces.landmarks)]
        faces = _distinct(faces)
        # A second look makes the result depend less on which proposal won, and agree with later refinement.
        second = self.refine(frames, faces)
        agreed = second.scores > self.config.thresholds[2]
        return _distinct(Faces.concatenate([second[agreed], faces[~agreed]]))

    def _propose(self, frames: list[Frame], levels: list[_Level]) -> _Boxes:
        """Run P-Net over the scanned levels; return squares."""
        found = []
        for level in levels:
            if not level.is_scanned:
                continue
            pixels = np.stack([_to_pixels(*item, level) for item in zip(frames, level.planes, strict=True)])
            offsets, probability = self._pnet(pixels)
            score = probability[:, 0]
            frame, row, column = np.nonzero(score >= self.config.thresholds[0])
            corner = np.stack([column, row], -1).astype(np.float32) * PNET_STRIDE_PX
            to_frame = np.array([frames[0].width / level.width, frames[0].height / level.height], np.float32)
            edges = np.concatenate([corner * to_frame, (corner + PNET_CELL_PX) * to_frame], -1)
            boxes = _Boxes(frame, edges, score[frame, row, column])
            keep = _nms(boxes, NMS_LEVEL_IOU)
            moved = _regress(edges[keep], offsets[frame, :, row, column][keep])
            found.append((frame[keep], _square(moved), boxes.scores[keep]))
        # The paper's code now removes overlaps above 0.7 across levels. There are none: cells of two levels
        # overlap by the square of the pyramid's factor at most.
        return _Boxes(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def _reject(self, frames: list[Frame], levels: list[_Level], boxes: _Boxes) -> _Boxes:
        """Run R-Net; return the squares that pass."""
        pixels = _sample_squares(frames, levels, boxes, RNET_SIZE_PX)
        offsets, probabilities = self._in_batches(self._rnet, pixels)
        boxes = _Boxes(boxes.frame, boxes.edges, probabilities[:, 1])
        passed = np.flatnonzero(boxes.scores > self.config.thresholds[1])
        keep = passed[_nms(boxes[passed], NMS_IOU)]
        moved = _regress(boxes.edges[keep], offsets[keep])
        return _Boxes(boxes.frame[keep], _square(moved), boxes.scores[keep])

    def _decide(self, frames: Sequence[Frame], squares: _Boxes) -> Faces:
        """Run O-Net; return one face per square, in the same order."""
        side = squares.edges[:, 2] - squares.edges[:, 0]
        scale = ONET_SIZE_PX / side
        frame_to_crop = np.zeros((len(side), 2, 3), np.float32)
        frame_to_crop[:, 0, 0] = frame_to_crop[:, 1, 1] = scale
        frame_to_crop[:, :, 2] = (0.5 - squares.edges[:, :2]) * scale[:, None] - 0.5
        pixels = gather_crops(frames, squares.frame, frame_to_crop, ONET_SIZE_PX) * np.float32(PIXEL_SCALE)
        offsets, points, probabilities = self._in_batches(self._onet, pixels)
        fractions = points.reshape(-1, 2, 5).transpose(0, 2, 1)  # [F, 5, 2]
        return Faces(
            frame_index=squares.frame,
            boxes=_regress(squares.edges, offsets) - np.float32(0.5),
            landmarks=squares.edges[:, None, :2] + fractions * side[:, None, None] - np.float32(0.5),
            scores=probabilities[:, 1],
        )

    def _in_batches(self, engine: Engine, pixels: FloatArray) -> list[FloatArray]:
        size = self.config.max_batch
        outputs = [engine(pixels[start : start + size]) for start in range(0, max(len(pixels), 1), size)]
        return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]


def load_detector(
    store: EngineStore,
    config: DetectConfig | None = None,
    *,
    backend: Backend = "onnxruntime",
    device: str = "cpu",
    threads: int = 1,
) -> Detector:
    """Return a detector whose engines come from `store`; arguments and errors as `EngineStore.load`."""
    pnet, rnet, onet = (store.load(program, backend, device, threads) for program in detector_programs())
    return Detector(pnet, rnet, onet, config)


def detector_programs() -> list[Program]:
    """Return the programs that `load_detector` loads."""
    return [pnet_program(), rnet_program(), onet_program()]


def _is_sensible(landmarks: FloatArray) -> npt.NDArray[np.bool_]:
    finite = np.isfinite(landmarks).all((1, 2))
    eyes = np.linalg.norm(landmarks[:, 1] - landmarks[:, 0], axis=-1)
    return finite & (eyes >= MIN_EYE_DISTANCE_PX)


def _pyramid(frames: list[Frame], smallest: float, factor: float) -> list[_Level]:
    """Return the frames' planes at falling sizes, each made from the one before.

    The first level that P-Net scans shows the smallest face at 12 pixels; the levels before it, up to twice
    as large, are for R-Net, which sees the same face at 24.
    """
    width, height = frames[0].width, frames[0].height
    first = scale = PNET_CELL_PX / smallest
    scales = []
    while scale * min(width, height) >= PNET_CELL_PX:
        scales.append(scale)
        scale *= factor
    while scales[0] < min(1, RNET_SIZE_PX / smallest):
        scales.insert(0, min(1, scales[0] / factor))
    planes: list[list[Plane]] = [[plane[..., :3] if plane.ndim == 3 else plane for plane in f.planes] for f in frames]
    levels = []
    for scale in scales:
        is_scanned = scale <= first
        w, h = width, height
        if is_scanned or scale < 1:
            w, h = (max(PNET_MIN_PX, 2 * round(side * scale / 2)) for side in (w, h))
        planes = [[_shrink(plane, w, h) for plane in frame] for frame in planes]
        levels.append(_Level(w, h, is_scanned, planes))
    return levels


def _shrink(plane: Plane, width: int, height: int) -> Plane:
    """Return `plane` at this size, or at its own along an axis where that is smaller."""
    size = (min(width, plane.shape[1]), min(height, plane.shape[0]))
    if size == plane.shape[1::-1]:
        return plane
    return cv2.resize(plane, size, interpolation=cv2.INTER_AREA)


def _to_pixels(frame: Frame, planes: list[Plane], level: _Level) -> FloatArray:
    """Return the planes as MTCNN's RGB: float32 [3, H, W]; planes that are smaller are enlarged."""
    size = (level.width, level.height)
    samples = [p if p.shape[1::-1] == size else cv2.resize(p, size, interpolation=cv2.INTER_LINEAR) for p in planes]
    return _normalise(frame, samples)


def _normalise(frame: Frame, samples: list[Plane]) -> FloatArray:
    """Return samples of all planes at the same places, [H, W] or [H, W, C], as MTCNN's RGB [3, H, W]."""
    layout = frame.layout
    top = np.iinfo(layout.dtype).max
    if len(samples) == 1 and samples[0].ndim == 2:  # gray has no chroma
        samples = samples + [np.full_like(samples[0], 2 ** (layout.bit_depth - 1))] * 2
    matrix, offset = yuv_to_rgb(color_of(frame), layout.bit_depth)
    to_codes = np.column_stack([matrix * top / 2 / 2**layout.shift, (offset + 1) * top / 2])
    # RGB of the same integer type: what MTCNN was trained on, clamped, and three times as fast as in float.
    rgb = cv2.transform(cv2.merge(samples), to_codes)
    pixels = np.empty((3, *rgb.shape[:2]), np.float32)
    for channel, plane in zip(pixels, cv2.split(rgb), strict=True):
        np.multiply(plane, np.float32(2 * PIXEL_SCALE / top), out=channel, dtype=np.float32)
    pixels -= np.float32(PIXEL_SCALE)
    return pixels


def _sample_squares(frames: list[Frame], levels: list[_Level], squares: _Boxes, size_px: int) -> FloatArray:
    """Return the squares as MTCNN's RGB, float32 [K, 3, S, S], from the levels where they are about S pixels.

    The levels are antialiased, so bilinear samples do, and all squares of a frame and level are one remap a
    plane. The frame's border is replicated.
    """
    pixels = np.empty((len(squares.frame), 3, size_px, size_px), np.float32)
    side = squares.edges[:, 2] - squares.edges[:, 0]
    scales = np.array([level.width / frames[0].width for level in levels])
    nearest = np.abs(np.log(scales * side[:, None] / size_px)).argmin(1)
    fractions = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px
    positions = squares.edges[:, :2, None] + fractions * side[:, None, None]  # [K, 2, S], edges
    for index, frame in enumerate(frames):
        for number, level in enumerate(levels):
            rows = np.flatnonzero((squares.frame == index) & (nearest == number))
            for part in np.split(rows, range(REMAP_ROWS // size_px, len(rows), REMAP_ROWS // size_px)):
                if len(part):
                    samples = [_remap(frame, plane, positions[part]) for plane in level.planes[index]]
                    rgb = _normalise(frame, samples)
                    pixels[part] = rgb.reshape(3, -1, size_px, size_px).swapaxes(0, 1)
    return pixels


def _remap(frame: Frame, plane: Plane, positions: FloatArray) -> Plane:
    """Return bilinear samples at frame positions [K, 2, S], one square below the other: [K S, S]."""
    count, _, size = positions.shape
    x = positions[:, 0] * np.float32(plane.shape[1] / frame.width) - np.float32(0.5)
    y = positions[:, 1] * np.float32(plane.shape[0] / frame.height) - np.float32(0.5)
    map_x = np.broadcast_to(x[:, None, :], (count, size, size)).reshape(-1, size)
    map_y = np.broadcast_to(y[:, :, None], (count, size, size)).reshape(-1, size)
    return cv2.remap(plane, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _regress(edges: FloatArray, offsets: FloatArray) -> FloatArray:
    """Move each edge of [K, 4] boxes by [K, 4] fractions of the box's width or height."""
    size = edges[:, 2:] - edges[:, :2]
    return edges + offsets * np.concatenate([size, size], 1)


def _square(edges: FloatArray) -> FloatArray:
    """Return squares about the same centres, as large as the longer sides."""
    centre = (edges[:, :2] + edges[:, 2:]) / 2
    half = np.maximum((edges[:, 2:] - edges[:, :2]).max(1, keepdims=True), 1) / 2
    return np.concatenate([centre - half, centre + half], 1)


def _distinct(faces: Faces) -> Faces:
    """Return the faces without those inside a stronger one: the same face found at another size."""
    return faces[_nms(_Boxes(faces.frame_index, faces.boxes, faces.scores), NMS_IOU, of_smaller=True)]


def _nms(boxes: _Boxes, threshold: float, of_smaller: bool = False) -> IntArray:
    """Return the rows of the boxes that stay, by frame and falling score.

    A box goes when a stronger one that stays overlaps it by more than `threshold`: intersection over union,
    or over the smaller of the two areas.
    """
    order = np.lexsort((-boxes.scores, boxes.frame))
    x0, y0, x1, y1 = np.ascontiguousarray(boxes.edges.T)
    area = (x1 - x0) * (y1 - y0)
    stay = []
    starts = np.flatnonzero(np.diff(boxes.frame[order], prepend=-1))
    for rest in np.split(order, starts[1:]):
        while len(rest):
            best, rest = rest[0], rest[1:]
            stay.append(best)
            width = np.minimum(x1[best], x1[rest]) - np.maximum(x0[best], x0[rest])
            height = np.minimum(y1[best], y1[rest]) - np.maximum(y0[best], y0[rest])
            shared = np.maximum(width, 0) * np.maximum(height, 0)
            whole = np.minimum(area[best], area[rest]) if of_smaller else area[best] + area[rest] - shared
            rest = rest[shared <= threshold * whole]
    return np.array(stay, np.int64)
