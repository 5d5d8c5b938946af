"""The scorecard's numbers for one video: how steady the judged age is, and whether the change moves with the face."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from faceage.align import align_faces
from faceage.geometry import invert_affine
from faceage.kernels import gather_crops, luma_plane, to_host
from faceage.types import FloatArray, Frame, IntArray
from train.evaluate.metrics import landmark_jitter, optical_flow, picture_mask, warp_residual
from train.readers.judge import JUDGE_PX

SAMPLES = 40
"""Frames a track at most whose age is read, evenly spaced; so many pairs of neighbours give the warp error."""
MIN_SAMPLES = 5
FULL_WEIGHT = 0.999
"""Frames in which a face is aged less than this are left out: it fades there, on purpose."""
FLOW_MARGIN_PX = 16
"""What the optical flow sees around a face."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Followed:
    """One track of the product."""

    track_id: int
    first_frame: int
    smoothed: FloatArray
    """float32 [T, 5, 2], frame pixels: what faces are aligned by."""
    measured: FloatArray
    """float32 [T, 5, 2], as the detector gave them; NaN where it saw no face."""
    weights: FloatArray
    """float32 [T], the share of the change that is applied."""

    def sampled(self) -> IntArray:
        """Return at most `SAMPLES` of the frames (of the video) in which the face is aged in full, evenly spaced."""
        full = np.flatnonzero(self.weights >= FULL_WEIGHT)
        chosen = np.unique(np.linspace(0, len(full) - 1, min(SAMPLES, len(full))).round().astype(np.int64))
        return full[chosen] + self.first_frame

    def is_aged_in_full(self, frame: int) -> bool:
        """Return whether the whole change is in a frame of the video."""
        at = frame - self.first_frame
        return 0 <= at < len(self.weights) and bool(self.weights[at] >= FULL_WEIGHT)

    def landmarks(self, frame: int) -> FloatArray:
        """Return float32 [5, 2] for a frame of the video."""
        return self.smoothed[frame - self.first_frame]


@dataclass
class _Seen:
    """What has been seen of one track so far."""

    frames: set[int]
    before: list[np.ndarray] = field(default_factory=list)
    after: list[np.ndarray] = field(default_factory=list)
    residual: float = 0.0
    change: float = 0.0


def measure_tracks(
    frames: Iterable[tuple[Frame, Frame]], tracks: list[Followed], read: Callable[[np.ndarray], FloatArray]
) -> list[dict[str, float]]:
    """Return the figures of each track that is aged in full for at least `MIN_SAMPLES` frames.

    Args:
        frames: (source, aged) of the whole video, from the first frame on.
        tracks: who is in it.
        read: returns ages [N] of aligned faces, uint8 [N, 128, 128, 3].
    """
    seen = {t.track_id: _Seen(set(t.sampled().tolist())) for t in tracks}
    tracks = [t for t in tracks if len(seen[t.track_id].frames) >= MIN_SAMPLES]
    last: tuple[Frame, Frame] | None = None
    for index, pair in enumerate(frames):
        for track in tracks:
            state = seen[track.track_id]
            if index not in state.frames:
                continue
            for picture, crops in zip(pair, (state.before, state.after), strict=True):
                crops.append(_crop(picture, track.landmarks(index)))
            if last is not None and track.is_aged_in_full(index - 1):
                residual, change = _motion(pair, last, track.landmarks(index), track.landmarks(index - 1))
                state.residual += residual
                state.change += change
        last = pair
    return [_figures(track, seen[track.track_id], read) for track in tracks]


def _figures(track: Followed, state: _Seen, read: Callable[[np.ndarray], FloatArray]) -> dict[str, float]:
    before, after = (read(np.stack(crops)) for crops in (state.before, state.after))
    known = np.where(np.isnan(track.measured), np.nan, track.smoothed)  # the same frames for both
    eyes = np.linalg.norm(track.smoothed[:, 1] - track.smoothed[:, 0], axis=-1)
    return {
        "track": track.track_id,
        "eyes_px": float(np.median(eyes)),
        "n": len(before),
        "source_age": float(before.mean()),
        "aged_age": float(after.mean()),
        "source_deviation": float(before.std(ddof=1)),
        "aged_deviation": float(after.std(ddof=1)),
        "change_deviation": float((after - before).std(ddof=1)),
        "warp_error": state.residual / state.change if state.change else float("nan"),
        "jitter_measured": landmark_jitter(track.measured),
        "jitter_smoothed": landmark_jitter(known),
    }


def _crop(frame: Frame, landmarks: FloatArray) -> npt.NDArray[np.uint8]:
    """Return the aligned face for the judge: uint8 [128, 128, 3]."""
    matrices = align_faces(landmarks[None], JUDGE_PX)
    (crop,) = gather_crops([frame], np.zeros(1, np.int64), matrices, JUDGE_PX)
    return np.rint((crop.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)


def _motion(
    now: tuple[Frame, Frame], last: tuple[Frame, Frame], landmarks: FloatArray, last_landmarks: FloatArray
) -> tuple[float, float]:
    """Return what `warp_residual` does, for the change of one face between two neighbouring frames."""
    matrices = align_faces(np.stack([landmarks, last_landmarks]), JUDGE_PX)
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float32) * (JUDGE_PX - 1)
    corners = np.concatenate([corners @ m[:, :2].T + m[:, 2] for m in invert_affine(matrices)])
    x0, y0 = np.maximum(np.floor(corners.min(0)).astype(int) - FLOW_MARGIN_PX, 0)
    x1, y1 = np.ceil(corners.max(0)).astype(int) + FLOW_MARGIN_PX
    part = (slice(y0, y1), slice(x0, x1))
    source, aged = (_luma(frame, part) for frame in now)
    last_source, last_aged = (_luma(frame, part) for frame in last)
    flow = optical_flow(*(np.clip(np.rint(y), 0, 255).astype(np.uint8) for y in (source, last_source)))
    to_crop = matrices[0].copy()
    to_crop[:, 2] += to_crop[:, :2] @ np.array([x0, y0], np.float32)
    height, width = source.shape
    inside = picture_mask(to_crop, JUDGE_PX, (height, width)) > 0
    return warp_residual(aged - source, last_aged - last_source, flow, inside)


def _luma(frame: Frame, part: tuple[slice, slice]) -> FloatArray:
    """Return the luma of a part of a frame in codes of 8 bits, float32 [H, W]; of RGB, the green."""
    luma = to_host(luma_plane(frame)[part])
    return luma.astype(np.float32) / 2.0 ** (frame.layout.bit_depth + frame.layout.shift - 8)
