"""Find faces and their five landmarks: MTCNN on native planes, batched over frames.

P-Net slides over a pyramid of downscaled pictures and proposes squares, R-Net rejects most of them at
24 pixels, O-Net decides at 48. A box depends on which of many proposals wins, and that on any pixel, so the
cascade's arithmetic is that of facenet-pytorch to the last pixel: its boxes are found again. The landmarks are
then made steadier than its, by O-Net alone, which also follows known faces from frame to frame: `Detector.refine`.

Convention: inside the cascade boxes are x0 y0 x1 y1 as MTCNN's code has them, which counts pixels from 1 and
both ends as inside: the box shows the pixels trunc(x0) - 1 to trunc(x1) - 1 of ours. What it gives is taken for
edges, as facenet-pytorch does to cut out faces; `Faces` has them half a pixel less, with centres at integers.

Reference: Zhang et al., "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional
Networks", 2016, arXiv:1604.02878.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt

from faceage.engines.base import Engine, Program, Runtime
from faceage.engines.registry import DEFAULT_RUNTIME
from faceage.engines.store import EngineStore
from faceage.kernels import AreaMeans, all_to_host, computing, gather_crops, select_candidates
from faceage.networks.mtcnn import (
    COARSE_PNET_MIN_PX,
    ONET_SIZE_PX,
    PNET_CELL_PX,
    PNET_MIN_PX,
    PNET_STRIDE_PX,
    RNET_SIZE_PX,
    onet_program,
    pnet_program,
    rnet_program,
)
from faceage.types import Faces, FloatArray, Frame, IntArray, Samples

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
NMS_BLOCK = 64
"""Boxes that are compared with all weaker ones at once."""

SEARCH_SIDE = 0.985
"""Side of the square that O-Net searches again, over the height of the box that it gave. It was trained on
squares about as high; with this factor 30 searches neither grow nor shrink boxes (median ratio 0.999)."""

LOOKS = 2
"""Searches by O-Net that place the landmarks of a new face. Between pictures shifted by a few pixels they move by
1.4 % of the face's height after the cascade, 0.8 % after one search and 0.7 % after two."""
MAX_DRIFT = 0.3
"""Movement of a box's edge in these searches, over its height, above which they have gone to something else."""

MAX_SUMMED_PIXELS = 16_000_000
"""Frames with more are shrunk by an integer first: the sums of a picture take four times its memory."""
SHRUNK_FACE_PX = 24
"""Frames are halved as long as the smallest face that is looked for keeps this side, which R-Net sees. Of 607 sure
faces in 12-megapixel pictures 4 are not found again, and 4 others are; landmarks move by 0.5 % of a face's height.
P-Net's half precision changes no more: with it 98 of 98 are found again, and their landmarks do not move."""


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
    corners: FloatArray
    """float32 [K, 4], x0 y0 x1 y1 in MTCNN's convention."""
    scores: FloatArray

    def __getitem__(self, rows: npt.NDArray) -> _Boxes:
        return _Boxes(self.frame[rows], self.corners[rows], self.scores[rows])


class Detector:
    """MTCNN. Calls are safe from several threads at once."""

    def __init__(
        self,
        pnet: Engine,
        rnet: Engine,
        onet: Engine,
        config: DetectConfig | None = None,
        coarse_pnet: Callable[[], Engine] | None = None,
    ) -> None:
        """Use these engines of `networks.mtcnn`; `load_detector` loads them.

        Args:
            pnet: see there.
            rnet: see there.
            onet: see there.
            config: what to look for.
            coarse_pnet: returns what proposes faces in reduced pictures, which are not exact either; None: `pnet`.
        """
        self.config = config or DetectConfig()
        self._pnet, self._rnet, self._onet = pnet, rnet, onet
        self._coarse_pnet = coarse_pnet or (lambda: pnet)

    def detect(self, frames: Sequence[Frame], least: float = 1.0) -> Faces:
        """Find all faces. Frames of the same size run as one batch, so give as many as memory allows.

        Args:
            frames: frames of any sizes and pixel formats; none is a normal value.
            least: side of the smallest face that is looked for, in sides of the configured smallest face. The time
                falls with its square.

        Returns:
            The faces, by frame and then by falling score. `frame_index` counts in `frames`. Boxes may reach
            over the frame's edge.
        """
        sizes = np.array([(frame.width, frame.height) for frame in frames]).reshape(-1, 2)
        parts = []
        with computing(frames[0].device if frames else None):  # the tracker calls it in threads
            for size in sorted(set(map(tuple, sizes.tolist()))):  # NumPy's unique imports numpy.ma, for 10 ms
                index = np.flatnonzero((sizes == size).all(1))
                faces = self._detect_same_size([frames[i] for i in index.tolist()], least)
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
        centre = (faces.boxes[:, :2] + faces.boxes[:, 2:] + 1) / 2  # of edges
        side = np.maximum(SEARCH_SIDE * (faces.boxes[:, 3] - faces.boxes[:, 1]), 1)
        low = centre - side[:, None] / 2
        scale = ONET_SIZE_PX / side
        frame_to_crop = np.zeros((len(side), 2, 3), np.float32)
        frame_to_crop[:, 0, 0] = frame_to_crop[:, 1, 1] = scale
        frame_to_crop[:, :, 2] = (0.5 - low) * scale[:, None] - 0.5

        def crops(part: slice) -> Samples:
            crops = gather_crops(frames, faces.frame_index[part], frame_to_crop[part], ONET_SIZE_PX)
            return crops * np.float32(PIXEL_SCALE)

        offsets, points, probabilities = self._in_batches(self._onet, len(faces), crops)
        fractions = points.reshape(-1, 2, 5).transpose(0, 2, 1)  # [F, 5, 2]
        boxes = np.tile(low, 2) + (offsets + np.array([0, 0, 1, 1], np.float32)) * side[:, None] - np.float32(0.5)
        landmarks = low[:, None] + fractions * side[:, None, None] - np.float32(0.5)
        lost = ~_is_sensible(landmarks)
        return Faces(
            frame_index=faces.frame_index,
            boxes=np.where(lost[:, None], faces.boxes, boxes),
            landmarks=np.where(lost[:, None, None], faces.landmarks, landmarks),
            scores=np.where(lost, np.float32(0), probabilities[:, 1]),
        )

    def _detect_same_size(self, frames: list[Frame], least: float) -> Faces:
        width, height = frames[0].width, frames[0].height
        smallest_px = least * self.config.smallest_face_px(width, height)
        if PNET_CELL_PX / smallest_px * min(width, height) < PNET_CELL_PX:
            return Faces.empty()
        halvings = max(0, int(math.log2(smallest_px / SHRUNK_FACE_PX)))
        shrink = max(2**halvings, math.ceil(math.sqrt(width * height / MAX_SUMMED_PIXELS)))
        means = AreaMeans(frames, scale=PIXEL_SCALE, shrink=shrink)
        faces = self._decide(means, self._reject(means, self._propose(means, smallest_px)))
        found = faces = faces[_is_sensible(faces.landmarks)]
        for _ in range(LOOKS):
            found = self.refine(frames, found)
        near = np.abs(found.boxes - faces.boxes).max(1) < MAX_DRIFT * (faces.boxes[:, 3] - faces.boxes[:, 1])
        agreed = near & (found.scores > self.config.thresholds[2])
        return replace(faces, landmarks=np.where(agreed[:, None, None], found.landmarks, faces.landmarks))

    def _propose(self, means: AreaMeans, smallest_px: float) -> _Boxes:
        """Run P-Net over a pyramid whose first level shows the smallest face at 12 pixels; return squares."""
        width, height = means.width, means.height
        scale = PNET_CELL_PX / smallest_px
        scales, scores, offsets = [], [], []
        while scale * min(width, height) >= PNET_CELL_PX:
            pixels = means.pictures(int(width * scale + 1), int(height * scale + 1))
            is_coarse = means.is_reduced and min(pixels.shape[2:]) >= COARSE_PNET_MIN_PX
            offset, probability = (self._coarse_pnet() if is_coarse else self._pnet)(pixels)
            scales.append(scale)
            scores.append(probability[:, 0])
            offsets.append(offset)
            scale *= self.config.pyramid_factor
        found = []
        for scale, cells in zip(scales, select_candidates(scores, offsets, self.config.thresholds[0]), strict=True):
            frame, row, column = cells.places
            corner = np.stack([column, row], -1).astype(np.float32) * PNET_STRIDE_PX
            corners = np.floor(np.concatenate([corner + 1, corner + PNET_CELL_PX], 1) / np.float32(scale))
            boxes = _Boxes(frame, corners, cells.scores)
            keep = _nms(boxes, NMS_LEVEL_IOU)
            moved = corners + cells.values * _sides(corners)
            found.append((frame[keep], _square(moved[keep]), boxes.scores[keep]))
        # The paper's code now removes overlaps above 0.7 across levels. There are none: cells of two levels
        # overlap by the square of the pyramid's factor at most.
        return _Boxes(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def _reject(self, means: AreaMeans, boxes: _Boxes) -> _Boxes:
        """Run R-Net; return the squares that pass."""
        offsets, probabilities = self._look(self._rnet, means, boxes, RNET_SIZE_PX)
        moved = boxes.corners + offsets * (_sides(boxes.corners) + 1)
        boxes = replace(boxes, scores=probabilities[:, 1])
        passed = np.flatnonzero(boxes.scores > self.config.thresholds[1])
        keep = passed[_nms(boxes[passed], NMS_IOU)]
        return _Boxes(boxes.frame[keep], _square(moved[keep]), boxes.scores[keep])

    def _decide(self, means: AreaMeans, boxes: _Boxes) -> Faces:
        """Run O-Net; return the faces."""
        offsets, points, probabilities = self._look(self._onet, means, boxes, ONET_SIZE_PX)
        low, high = _pixels_inside(boxes.corners, means)
        fractions = points.reshape(-1, 2, 5).transpose(0, 2, 1)  # [F, 5, 2]
        landmarks = low[:, None] + fractions * (high - low)[:, None] - 0.5
        corners = boxes.corners + offsets * (_sides(boxes.corners) + 1)
        boxes = _Boxes(boxes.frame, corners + np.array([0, 0, 1, 1], np.float32), probabilities[:, 1])
        passed = np.flatnonzero(boxes.scores > self.config.thresholds[2])
        keep = passed[_nms(boxes[passed], NMS_IOU, of_smaller=True)]
        return Faces(
            frame_index=boxes.frame[keep],
            boxes=corners[keep] - np.float32(0.5),
            landmarks=landmarks[keep].astype(np.float32),
            scores=boxes.scores[keep],
        )

    def _look(self, engine: Engine, means: AreaMeans, boxes: _Boxes, size_px: int) -> list[FloatArray]:
        """Run R- or O-Net on what the boxes show."""
        low, high = _pixels_inside(boxes.corners, means)

        def crops(part: slice) -> Samples:
            return means.rectangles(boxes.frame[part], low[part], high[part], size_px)

        return self._in_batches(engine, len(low), crops)

    def _in_batches(self, engine: Engine, count: int, crops: Callable[[slice], Samples]) -> list[FloatArray]:
        size = self.config.max_batch
        outputs = [engine(crops(slice(start, start + size))) for start in range(0, max(count, 1), size)]
        on_host = [all_to_host(parts) for parts in outputs]
        return [np.concatenate(parts) for parts in zip(*on_host, strict=True)]


def load_detector(
    store: EngineStore, config: DetectConfig | None = None, runtime: Runtime = DEFAULT_RUNTIME
) -> Detector:
    """Return a detector whose engines come from `store`; `runtime` and errors as `EngineStore.load`."""
    pnet, rnet, onet = (store.load(program, runtime) for program in detector_programs())
    return Detector(pnet, rnet, onet, config, cache(lambda: store.load(pnet_program(exact=False), runtime)))


def detector_programs() -> list[Program]:
    """Return the programs that `load_detector` loads."""
    return [pnet_program(), rnet_program(), onet_program()]


def _is_sensible(landmarks: FloatArray) -> npt.NDArray[np.bool_]:
    eyes = np.linalg.norm(landmarks[:, 1] - landmarks[:, 0], axis=-1)
    return np.isfinite(landmarks).all((1, 2)) & (eyes >= MIN_EYE_DISTANCE_PX)


def _pixels_inside(corners: FloatArray, means: AreaMeans) -> tuple[IntArray, IntArray]:
    """Return what boxes show of a frame: pixels [low, high), int64 [K, 2] each."""
    size = np.array([means.width, means.height])
    whole = np.trunc(corners).astype(np.int64)
    low = np.clip(whole[:, :2] - 1, 0, size - 1)
    return low, np.clip(whole[:, 2:], low + 1, size)


def _sides(corners: FloatArray) -> FloatArray:
    """Return x1 - x0 and y1 - y0 for each corner: [K, 4]."""
    return np.tile(corners[:, 2:] - corners[:, :2], 2)


def _square(corners: FloatArray) -> FloatArray:
    """Return squares about the same centres, as large as the longer sides."""
    size = corners[:, 2:] - corners[:, :2]
    side = size.max(1, keepdims=True)
    low = corners[:, :2] + size * np.float32(0.5) - side * np.float32(0.5)
    return np.concatenate([low, low + side], 1)


def _nms(boxes: _Boxes, threshold: float, of_smaller: bool = False) -> IntArray:
    """Return the rows of the boxes that stay, by frame and falling score.

    A box goes when a stronger one that stays overlaps it by more than `threshold`: intersection over union,
    or over the smaller of the two areas.
    """
    order = np.lexsort((-boxes.scores, boxes.frame))
    x0, y0, x1, y1 = np.ascontiguousarray(boxes.corners.T)
    area = (x1 - x0) * (y1 - y0)
    stay = [order[:0]]
    for rest in np.split(order, np.flatnonzero(np.diff(boxes.frame[order])) + 1):
        while len(rest):
            head = rest[:NMS_BLOCK, None]
            width = np.minimum(x1[head], x1[rest]) - np.maximum(x0[head], x0[rest])
            height = np.minimum(y1[head], y1[rest]) - np.maximum(y0[head], y0[rest])
            shared = np.maximum(width, 0) * np.maximum(height, 0)
            whole = np.minimum(area[head], area[rest]) if of_smaller else area[head] + area[rest] - shared
            gone = np.zeros(len(rest), bool)
            for row, weaker in enumerate(np.triu(shared > threshold * whole, 1)):
                if not gone[row]:
                    gone |= weaker
            stay.append(rest[:NMS_BLOCK][~gone[:NMS_BLOCK]])
            rest = rest[NMS_BLOCK:][~gone[NMS_BLOCK:]]
    return np.concatenate(stay)
