import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from faceage import cuts
from faceage.align import face_weights
from faceage.cuts import LOOK_AHEAD, mark_cuts
from faceage.detect import load_detector
from faceage.engines.store import EngineStore
from faceage.geometry import template_5
from faceage.kernels import begin_thumbnail
from faceage.media.video import VideoReader
from faceage.smooth import smooth_landmarks, solve_penalised
from faceage.track import TrackConfig, Tracker
from faceage.types import ColorSpec, Faces, Frame

RATE = 25.0
WIDTH, HEIGHT = 640, 360
SMALLEST_PX = 24
MEDIA = Path(__file__).parents[2] / "shared" / "media"


# ------------------------------------------------------------------ a world of moving faces, and its detector


@dataclass
class Person:
    """A square face whose centre is at `where(frame)`, or nowhere (None)."""

    where: Callable[[int], tuple[float, float] | None]
    side: float = 60.0
    score: float = 0.99

    def box(self, frame: int) -> np.ndarray | None:
        place = self.where(frame)
        if place is None:
            return None
        x, y = place
        return np.array([x - self.side / 2, y - self.side / 2, x + self.side / 2, y + self.side / 2])


def origin(frame: Frame) -> np.ndarray:
    """Where in the whole picture a part of it (a view) begins."""
    plane = whole = frame.planes[0]
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    bytes_in = plane.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    return np.array([bytes_in % plane.strides[0], bytes_in // plane.strides[0]])


class StubDetector:
    """Knows where the faces are: the frame's pts is its index in the world."""

    def __init__(self, people: Sequence[Person], noise: float = 0.0, blind: Sequence[int] = ()) -> None:
        self.people, self.noise, self.blind = people, noise, set(blind)
        self.detected: list[int] = []
        self.complete: list[int] = []
        self.searched: list[int] = []
        self.refined = 0

    def _noise(self, *key: int) -> np.ndarray:
        return np.random.default_rng(key).normal(0, self.noise, (7, 2)) if self.noise else np.zeros((7, 2))

    def _seen(self, frame: int) -> list[tuple[int, np.ndarray]]:
        boxes = [(n, person.box(frame)) for n, person in enumerate(self.people)]
        return [(n, box) for n, box in boxes if box is not None]

    def _rows(self, rows: list[tuple[int, np.ndarray, np.ndarray, float]]) -> Faces:
        if not rows:
            return Faces.empty()
        frame_index, boxes, landmarks, scores = zip(*rows, strict=True)
        return Faces(
            frame_index=np.array(frame_index, np.int64),
            boxes=np.array(boxes, np.float32),
            landmarks=np.array(landmarks, np.float32),
            scores=np.array(scores, np.float32),
        )

    def _face(self, row: int, frame: int, person: int, box: np.ndarray) -> tuple:
        side = self.people[person].side
        noise = self._noise(frame, person) * side
        landmarks = box[:2] + template_5(1000) / 1000 * side + noise[:5]
        return row, box + noise[5:].reshape(4), landmarks, self.people[person].score

    def detect(self, frames: Sequence[Frame], least: float = 1.0) -> Faces:
        rows = []
        for row, frame in enumerate(frames):
            corner = np.tile(origin(frame), 2)
            if frame.width == WIDTH:
                self.detected.append(frame.pts)
                self.complete += [frame.pts] if least == 1 else []
            else:
                self.searched.append(frame.pts)
            if frame.pts not in self.blind:
                seen = [(n, box - corner) for n, box in self._seen(frame.pts)]
                inside = [
                    (n, box)
                    for n, box in seen
                    if box[:2].min() >= 0
                    and np.all(box[2:] < frame.planes[0].shape[::-1])
                    and self.people[n].side >= least * SMALLEST_PX
                ]
                rows += [self._face(row, frame.pts, n, box) for n, box in inside]
        return self._rows(rows)

    def refine(self, frames: Sequence[Frame], faces: Faces) -> Faces:
        self.refined += len(faces)
        rows = []
        for row, box, landmarks in zip(faces.frame_index, faces.boxes, faces.landmarks, strict=True):
            frame = frames[row].pts
            side = box[2] - box[0]
            near = [
                (np.abs(other[:2] + other[2:] - box[:2] - box[2:]).max() / 2, n, other)
                for n, other in self._seen(frame)
            ]
            distance, person, other = min(near, default=(np.inf, 0, box), key=lambda item: item[:2])
            if distance < 0.5 * side:
                rows.append(self._face(int(row), frame, person, other))
            else:
                rows.append((int(row), box, landmarks, 0.05))
        return self._rows(rows)


def picture(frame: int, scene: int = 0) -> np.ndarray:
    """A textured luma plane; each scene has its own."""
    rng = np.random.default_rng(scene)
    coarse = rng.integers(16, 235, (6, 10)).astype(np.uint8)
    return np.kron(coarse, np.ones((HEIGHT // 6, WIDTH // 10), np.uint8))


def make_frame(luma: np.ndarray, index: int) -> Frame:
    if luma.dtype == np.uint16:
        return Frame(planes=(luma,), pixel_format="gray16", color=ColorSpec(), pts=index, time_base=Fraction(1, 25))
    return Frame(planes=(luma,), pixel_format="gray", color=ColorSpec(), pts=index, time_base=Fraction(1, 25))


def clip(count: int, cuts: Sequence[int] = ()) -> list[Frame]:
    pictures = [picture(0, scene) for scene in range(len(cuts) + 1)]
    return [make_frame(pictures[sum(n >= cut for cut in cuts)], n) for n in range(count)]


def run(detector: StubDetector, frames, **config):
    tracker = Tracker(detector, TrackConfig(**config))
    windows = list(tracker.scan(frames))
    return tracker.tracks(), windows


def centre(track, frame: int) -> np.ndarray:
    """Where the face is, from its landmarks."""
    offset = (template_5(1000) / 1000).mean(0) - 0.5
    landmarks = track.landmarks[frame - track.first_frame]
    eyes = np.linalg.norm(landmarks[1] - landmarks[0])
    return landmarks.mean(0) - offset * eyes / 0.39


def line(x: float, y: float, dx: float = 0.0, dy: float = 0.0, first: int = 0, last: int = 10**9, hidden=()):
    return lambda n: (x + dx * n, y + dy * n) if first <= n <= last and n not in hidden else None


# ------------------------------------------------------------------ tracking


def test_one_face_is_one_track_of_all_frames():
    detector = StubDetector([Person(line(200, 100, 2, 1))])
    tracks, _ = run(detector, clip(47))
    assert [(t.track_id, t.first_frame, t.last_frame, t.shot) for t in tracks] == [(0, 0, 46, 0)]
    assert tracks[0].starts_shot
    assert tracks[0].ends_shot
    for n in (0, 20, 46):
        np.testing.assert_allclose(centre(tracks[0], n), (200 + 2 * n, 100 + n), atol=0.1)
    assert sorted(detector.detected) == [0, 10, 20, 30, 40, 46]  # each key frame once, and the last


def test_windows_cover_every_frame_once_with_its_faces():
    people = [Person(line(150, 100, 1)), Person(line(450, 200, -1), 40)]
    _, windows = run(StubDetector(people), clip(47, cuts=[23]))
    assert [frame.pts for window in windows for frame in window.frames] == list(range(47))
    assert [window.first_frame for window in windows] == [0, 10, 20, 23, 33, 43]
    assert [window.shot for window in windows] == [0, 0, 0, 1, 1, 1]
    for window in windows:
        assert len(window.faces) == len(window.track_ids) == 2 * len(window.frames)
        for row, track_id in enumerate(window.track_ids):
            n = window.first_frame + int(window.faces.frame_index[row])
            np.testing.assert_allclose(window.faces.boxes[row], people[track_id % 2].box(n), atol=1e-3)


def test_no_face():
    tracks, windows = run(StubDetector([]), clip(25))
    assert tracks == []
    assert [len(window.faces) for window in windows] == [0, 0, 0]


def test_no_frame():
    assert run(StubDetector([]), []) == ([], [])


def test_one_frame():
    tracks, windows = run(StubDetector([Person(line(200, 100))]), clip(1))
    assert [(t.first_frame, t.last_frame, t.starts_shot, t.ends_shot) for t in tracks] == [(0, 0, True, True)]
    assert len(windows) == 1


@pytest.mark.parametrize("count", [2, 3, 10, 11, 12])
def test_short_clips(count):
    tracks, _ = run(StubDetector([Person(line(200, 100, 1))]), clip(count))
    assert [(t.first_frame, t.last_frame) for t in tracks] == [(0, count - 1)]


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_new_face_is_followed_back_to_its_first_frame(noise):
    detector = StubDetector([Person(line(100, 100)), Person(line(500, 200, -3, first=13))], noise)
    tracks, _ = run(detector, clip(40))
    assert [(t.track_id, t.first_frame, t.last_frame) for t in tracks] == [(0, 0, 39), (1, 13, 39)]
    assert not tracks[1].starts_shot


def test_smallest_faces_are_looked_for_at_times_and_where_much_changes():
    small = StubDetector([Person(line(100, 100), side=30), Person(line(500, 200, first=22), side=30)])
    tracks, _ = run(small, clip(100))
    assert sorted(small.detected) == [*range(0, 100, 10), 99]
    assert sorted(small.complete) == [0, 10, 50, 90, 99]  # every fourth, and the first and the last of a shot
    assert [(t.track_id, t.first_frame, t.last_frame) for t in tracks] == [(0, 0, 99), (1, 40, 99)]

    changing = [make_frame(picture(0) // 4 + np.uint8(3 * n), n) for n in range(60)]
    small = StubDetector([Person(line(100, 100), side=30), Person(line(500, 200, first=22), side=30)])
    tracks, _ = run(small, changing)
    assert sorted(small.complete) == [*range(0, 60, 10), 59]
    assert [(t.track_id, t.first_frame, t.last_frame) for t in tracks] == [(0, 0, 59), (1, 22, 59)]


def test_face_that_leaves_ends_its_track():
    tracks, _ = run(StubDetector([Person(line(100, 100, last=24)), Person(line(500, 200))]), clip(60))
    assert [(t.first_frame, t.last_frame, t.ends_shot) for t in tracks] == [(0, 24, False), (0, 59, True)]


def test_lost_face_is_searched_once_and_nearby():
    detector = StubDetector([Person(line(100, 100, last=24)), Person(line(500, 200))])
    run(detector, clip(40))
    assert sorted(detector.detected) == [0, 10, 20, 30, 39]
    assert detector.searched == [25]


def test_lost_face_that_jumped_is_found_again_in_the_same_frame():
    """A jump of two thirds of a face is too far for `refine`."""
    where = lambda n: (200 + 2 * n + 40 * (n >= 14), 100)  # noqa: E731
    detector = StubDetector([Person(where)])
    tracks, _ = run(detector, clip(40), match_distance=0.8)
    assert [(t.first_frame, t.last_frame) for t in tracks] == [(0, 39)]
    assert detector.searched == [14]
    np.testing.assert_allclose(centre(tracks[0], 16), (272, 100), atol=1)
    assert tracks[0].scores.min() > 0.9


def test_ids_are_in_order_of_appearance():
    people = [
        Person(line(500, 100, first=27)),
        Person(line(300, 100)),
        Person(line(100, 100)),
        Person(line(100, 250, first=12)),
        Person(line(300, 250, first=16)),
    ]
    tracks, _ = run(StubDetector(people), clip(50))
    assert [t.track_id for t in tracks] == [0, 1, 2, 3, 4]
    firsts = [(t.first_frame, round(float(centre(t, t.first_frame)[0]))) for t in tracks]
    assert firsts == [(0, 100), (0, 300), (12, 100), (16, 300), (27, 500)]


def test_short_occlusion_is_one_track_with_a_filled_gap():
    hidden = range(22, 32)
    tracks, windows = run(StubDetector([Person(line(100, 100, 3, hidden=hidden))]), clip(60))
    assert [(t.first_frame, t.last_frame) for t in tracks] == [(0, 59)]
    for n in (21, 26, 31, 40):
        np.testing.assert_allclose(centre(tracks[0], n), (100 + 3 * n, 100), atol=0.5)
    scores = tracks[0].scores
    assert scores[26] == 0
    assert scores[20] == scores[23] == scores[40] == pytest.approx(0.99)
    assert not any(n in hidden for w in windows for n in w.first_frame + w.faces.frame_index)


def test_long_occlusion_makes_two_tracks():
    tracks, _ = run(StubDetector([Person(line(100, 100, hidden=range(20, 45)))]), clip(80))
    assert [(t.first_frame, t.last_frame) for t in tracks] == [(0, 19), (45, 79)]


def test_blind_key_frame_does_not_break_a_track():
    tracks, _ = run(StubDetector([Person(line(100, 100, 1))], blind=[20]), clip(60))
    assert [(t.first_frame, t.last_frame) for t in tracks] == [(0, 59)]
    assert tracks[0].scores.min() > 0.9


@pytest.mark.parametrize("gap", [40, 20, 5])
def test_crossing_faces_keep_their_ids(gap):
    """Two people pass each other, at a vertical distance of `gap` pixels between faces of 60."""
    people = [Person(line(100, 150, 5)), Person(line(500, 150 + gap, -5))]
    tracks, _ = run(StubDetector(people, 0.01), clip(81))
    long = [t for t in tracks if len(t) > 40]
    assert [t.track_id for t in long] == [0, 1]
    for track, dx in zip(long, (5, -5), strict=True):
        assert (track.first_frame, track.last_frame) == (0, 80)
        np.testing.assert_allclose(centre(track, 80) - centre(track, 0), (80 * dx, 0), atol=6)
    assert len(tracks) == 2


def test_one_person_in_front_of_another():
    """The person behind is hidden while the boxes overlap."""
    people = [Person(line(100, 150, 5)), Person(line(310, 150, hidden=range(34, 51)))]
    tracks, _ = run(StubDetector(people, 0.01), clip(90), max_gap_frames=25)
    assert len(tracks) == 2
    np.testing.assert_allclose(centre(tracks[0], 89), (100 + 5 * 89, 150), atol=2)
    np.testing.assert_allclose(centre(tracks[1], 89), (310, 150), atol=2)


def test_cuts_reset_tracks():
    people = [
        Person(line(100, 100, last=29)),
        Person(line(110, 105, first=30)),
        Person(line(400, 200, first=30)),
    ]
    tracks, _ = run(StubDetector(people), clip(64, cuts=[30]))
    got = [(t.first_frame, t.last_frame, t.shot, t.starts_shot, t.ends_shot) for t in tracks]
    assert got == [(0, 29, 0, True, True), (30, 63, 1, True, True), (30, 63, 1, True, True)]


def test_face_that_appears_right_before_a_cut_is_found():
    people = [Person(line(100, 100, first=22, last=29))]
    tracks, _ = run(StubDetector(people), clip(60, cuts=[30]))
    assert [(t.first_frame, t.last_frame, t.ends_shot) for t in tracks] == [(22, 29, True)]


def test_false_alarms_are_dropped():
    people = [
        Person(line(100, 100, first=20, last=20)),  # too short
        Person(line(300, 100, first=28, last=35), score=0.8),  # weak, detected once
        Person(line(500, 100, first=28, last=35)),  # as short, but sure
    ]
    tracks, _ = run(StubDetector(people), clip(60))
    assert [(t.first_frame, t.last_frame) for t in tracks] == [(28, 35)]


def test_memory_is_bounded():
    """Frames are let go as soon as their window is."""
    held: list[weakref.ref] = []
    most = 0

    class Luma(np.ndarray):
        pass

    def stream():
        nonlocal most
        for n in range(300):
            luma = picture(n).view(Luma)
            held.append(weakref.ref(luma))
            frame = make_frame(luma, n)
            del luma
            most = max(most, sum(ref() is not None for ref in held))
            yield frame

    tracker = Tracker(StubDetector([Person(line(100, 100))]), TrackConfig(detect_every=10))
    for window in tracker.scan(stream()):
        assert len(window.frames) <= 11
        del window
    # The window being handed out and its key frame, those ahead, and the one being made.
    assert most <= 2 * 11 + LOOK_AHEAD + 2


def test_same_input_same_tracks():
    people = [Person(line(100, 150, 4)), Person(line(500, 160, -4)), Person(line(300, 40, first=13))]
    first, _ = run(StubDetector(people, 0.02), clip(80))
    second, _ = run(StubDetector(people, 0.02), clip(80))
    assert [t.track_id for t in first] == [t.track_id for t in second]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.landmarks, b.landmarks)


@pytest.mark.parametrize(
    "bad",
    [
        {"detect_every": 0},
        {"complete_every": 0},
        {"keep_score": 1.5},
        {"match_distance": 0.0},
        {"max_gap_frames": -1},
        {"min_track_frames": 0},
    ],
)
def test_config_is_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrackConfig(**bad)


# ------------------------------------------------------------------ cuts


def cuts_of(pictures: Sequence[np.ndarray]) -> list[int]:
    frames = [make_frame(luma, n) for n, luma in enumerate(pictures)]
    return [frame.pts for frame, cut, _ in mark_cuts(frames) if cut]


def photo(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Something like a natural picture: random structure of all sizes, with its own brightness."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    spectrum = (rng.normal(size=(height, width)) + 1j * rng.normal(size=(height, width))) / (
        np.hypot(fy, fx) + 2e-3
    ) ** 1.5
    image = np.fft.ifft2(spectrum).real
    image = 110 + 25 * rng.uniform(-1, 1) + rng.uniform(35, 55) * image / image.std()
    return np.clip(image, 0, 255).astype(np.uint8)


def noisy(image: np.ndarray, seed: int, sigma: float = 3.0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("seed", range(10))
def test_cut_is_found(seed):
    a, b = photo(2 * seed), photo(2 * seed + 1)
    assert cuts_of([noisy(a if n < 12 else b, n) for n in range(24)]) == [0, 12]


def test_cut_near_the_end_and_two_near_cuts_are_found():
    a, b, c = photo(0), photo(1), photo(2)
    assert cuts_of([a] * 12 + [b]) == [0, 12]
    assert cuts_of([a] * 12 + [b] * 5 + [c] * 5) == [0, 12, 17]


def test_cut_of_10_bit_frames_is_found():
    a, b = photo(0).astype(np.uint16) << 8, photo(1).astype(np.uint16) << 8
    assert cuts_of([a] * 12 + [b] * 12) == [0, 12]


@pytest.mark.parametrize("speed", [4, 16, 40])
@pytest.mark.parametrize("still", [0, 10])
def test_pan_is_no_cut(speed, still):
    wide = photo(3, HEIGHT, 2400)
    where = [max(0, n - still) * speed for n in range(24)]
    assert cuts_of([np.ascontiguousarray(wide[:, x : x + WIDTH]) for x in where]) == [0]


@pytest.mark.parametrize("length", [6, 25])
def test_fades_are_no_cuts(length):
    a, b = photo(4).astype(np.float64), photo(5)
    black = [(a * max(0.0, 1 - n / length) + 16 * min(1.0, n / length)).astype(np.uint8) for n in range(length + 5)]
    assert cuts_of([photo(4)] * 10 + black) == [0]
    dissolve = [(a + (b - a) * min(1.0, n / length)).astype(np.uint8) for n in range(length + 5)]
    assert cuts_of([photo(4)] * 10 + dissolve) == [0]


@pytest.mark.parametrize("gain", [1.5, 3.0, 20.0])
@pytest.mark.parametrize("length", [1, 2])
def test_flash_is_no_cut(gain, length):
    bright = np.clip(photo(6) * gain + 20, 0, 255).astype(np.uint8)
    assert cuts_of([photo(6)] * 10 + [bright] * length + [photo(6)] * 10) == [0]


def test_something_large_that_moves_is_no_cut():
    scene, thing = photo(7), photo(8)
    pictures = []
    for n in range(30):
        luma = scene.copy()
        x = 30 * n - 200
        luma[60:, max(x, 0) : max(x + 250, 0)] = thing[60:, : len(luma[0, max(x, 0) : max(x + 250, 0)])]
        pictures.append(luma)
    assert cuts_of(pictures) == [0]


def test_looking_for_cuts_is_cheap():
    frames = [make_frame(np.zeros((1080, 1920), np.uint8), n) for n in range(20)]
    start = time.perf_counter()
    assert len(list(mark_cuts(frames))) == 20
    assert (time.perf_counter() - start) / 20 < 5e-3  # 0.2 ms when nothing else runs


def test_thumbnails_are_asked_for_before_they_are_needed(monkeypatch):
    """So a device has sent them by then."""
    events = []

    def begin(frame):
        events.append(("begun", frame.pts))
        return lambda: events.append(("needed", frame.pts)) or begin_thumbnail(frame)()

    monkeypatch.setattr(cuts, "begin_thumbnail", begin)
    planes = (np.full((54, 96), 99, np.uint8),)
    frames = [Frame(planes=planes, pixel_format="gray", color=ColorSpec(), pts=number) for number in range(8)]
    for frame, _, _ in mark_cuts(frames):
        assert events.index(("needed", frame.pts)) > events.index(("begun", min(frame.pts + LOOK_AHEAD, 7)))


# ------------------------------------------------------------------ smoothing


FACE = template_5(250)


def smooth(landmarks, observed=None):
    count = len(landmarks)
    observed = np.ones(count, bool) if observed is None else observed
    return smooth_landmarks(landmarks.astype(np.float32), np.ones(count, np.float32), observed, RATE)


def moving(offset: np.ndarray) -> np.ndarray:
    """A face of about 100 pixels between the eyes, moved by offset [T, 2]."""
    return (FACE[None] + offset[:, None]).astype(np.float32)


def swing(count: int, hertz: float, amplitude: float) -> np.ndarray:
    x = amplitude * np.sin(2 * np.pi * hertz * np.arange(count) / RATE)
    return np.stack([x, np.zeros(count)], -1)


def test_solver_is_the_dense_solution():
    rng = np.random.default_rng(0)
    for count in (3, 4, 5, 40):
        values, weight, pull = (
            rng.normal(size=(count, 3)),
            rng.random(count) + 0.1,
            rng.random(count - 2) + 0.1,
        )
        weight[2 : count // 2] = 0
        second = np.diff(np.eye(count), 2, axis=0)
        dense = np.linalg.solve(np.diag(weight) + second.T @ np.diag(pull) @ second, weight[:, None] * values)
        np.testing.assert_allclose(solve_penalised(values, weight, pull), dense, atol=1e-9)


def test_straight_motion_is_kept():
    raw = moving(np.arange(100)[:, None] * np.array([7.0, -3.0]))
    np.testing.assert_allclose(smooth(raw), raw, atol=0.01)


def test_smoothing_is_zero_phase():
    rng = np.random.default_rng(0)
    raw = moving(np.cumsum(rng.normal(0, 3, (80, 2)), 0))
    np.testing.assert_allclose(smooth(raw[::-1])[::-1], smooth(raw), atol=0.02)


@pytest.mark.parametrize(
    ("hertz", "amplitude", "least"),
    [(0.5, 10, 0.99), (1, 5, 0.95), (1, 50, 0.98), (2, 20, 0.95), (3, 50, 0.95), (5, 50, 0.9)],
)
def test_true_motion_keeps_its_amplitude(hertz, amplitude, least):
    raw = moving(swing(200, hertz, amplitude))
    got = smooth(raw)
    ratio = np.ptp(got[40:160, 0, 0]) / np.ptp(raw[40:160, 0, 0])
    assert least < ratio < 2.05 - least


def test_noise_is_reduced():
    rng = np.random.default_rng(0)
    raw = moving(swing(400, 0.3, 30))
    error = smooth(raw + rng.normal(0, 0.5, raw.shape)) - raw
    assert error.std() < 0.5 / 1.5
    assert np.diff(error, 2, axis=0).std() < 0.5 * np.sqrt(6) / 5


def test_single_outliers_do_no_harm():
    raw = moving(swing(100, 0.5, 30))
    bad = raw.copy()
    bad[[20, 50, 51, 80]] += 60
    assert np.abs(smooth(bad) - raw).max() < 2


def test_jump_is_not_smeared():
    """A cut that was missed, or a detector that changed its mind: off by a face for three frames at most."""
    raw = moving(np.where(np.arange(60) < 30, 0, 150)[:, None] * np.array([1.0, 0.0]))
    error = np.abs(smooth(raw) - raw).max((1, 2))
    assert (error > 10).sum() <= 6


def test_holes_are_filled():
    raw = moving(swing(100, 0.3, 40))
    observed = np.ones(100, bool)
    observed[40:48] = False
    hollow = np.where(observed[:, None, None], raw, 0)
    assert np.abs(smooth(hollow, observed) - raw).max() < 4


def test_long_tracks_are_smoothed_fast():
    rng = np.random.default_rng(0)
    raw = moving(np.cumsum(rng.normal(0, 1, (10_000, 2)), 0))
    start = time.perf_counter()
    assert smooth(raw).shape == raw.shape
    assert time.perf_counter() - start < 5  # 0.3 s when nothing else runs


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_few_frames(count):
    raw = moving(np.zeros((count, 2)))
    np.testing.assert_allclose(smooth(raw), raw, atol=1e-3)


# ------------------------------------------------------------------ real clips


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return load_detector(EngineStore(tmp_path_factory.mktemp("engines")))


def real_tracks(detector, name: str):
    path = MEDIA / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    tracker = Tracker(detector)
    with VideoReader(path) as reader:
        count = sum(len(window.frames) for window in tracker.scan(reader))
    return tracker.tracks(), count


def jitter_percent(landmarks: np.ndarray) -> float:
    """Second difference, root mean square, in percent of the eye distance."""
    eyes = np.linalg.norm(landmarks[:, 1] - landmarks[:, 0], axis=-1).mean()
    return 100 * np.sqrt((np.diff(landmarks, 2, axis=0) ** 2).sum(-1).mean()) / eyes


@pytest.mark.slow
def test_talking_head(detector):
    (track,), count = real_tracks(detector, "talking_head_1080.mp4")
    assert count == 250
    assert (track.first_frame, track.last_frame, track.starts_shot, track.ends_shot) == (0, 249, True, True)
    assert jitter_percent(track.landmarks) < 0.7  # 1.8 before smoothing
    weights = face_weights(track.landmarks, track.scores, fade_in=False, fade_out=False, frame_rate=30.0)
    assert weights.min() > 0.95


@pytest.mark.slow
def test_street_crowd(detector):
    tracks, count = real_tracks(detector, "street_crowd_1080p.mp4")
    assert count == 105
    assert sum(len(track) > 25 for track in tracks) >= 5
    assert sum(len(track) == 105 for track in tracks) >= 1
    assert len(tracks) <= 14  # 11 people and little else: nobody is broken into pieces
    assert {track.shot for track in tracks} == {0}
