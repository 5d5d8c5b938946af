"""The detector against facenet-pytorch's MTCNN, and what a tracker and a pipeline rely on.

MTCNN's boxes move with the proposal that happens to win: facenet-pytorch's own agree with those of the same
picture shifted by (3, 2) pixels to an IoU of 0.94 on average, 0.82 at worst, and landmarks to 4 % of the eye
distance, 15 % at worst (43 faces of the photos and clips). The tolerances here come from that.
"""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from skimage import data

from faceage.detect import DetectConfig, Detector, detector_programs, load_detector
from faceage.engines.store import EngineStore
from faceage.types import RGB, ColorSpec, Faces, Frame

MEDIA = Path(__file__).parents[2] / "shared" / "media"
ALL = DetectConfig(min_face_px=20, max_picture_px=16384)


@pytest.fixture(scope="session")
def engine_store(tmp_path_factory):
    return EngineStore(tmp_path_factory.mktemp("detector_engines"))


@pytest.fixture(scope="session")
def detector(engine_store):
    return load_detector(engine_store, ALL)


@pytest.fixture(scope="session")
def reference():
    """facenet-pytorch's MTCNN: picture to (boxes, scores, landmarks)."""
    mtcnn = pytest.importorskip("facenet_pytorch").MTCNN(min_face_size=20, keep_all=True, device="cpu")

    def detect(picture):
        boxes, scores, landmarks = mtcnn.detect(picture, landmarks=True)
        if boxes is None:
            return np.zeros((0, 4)), np.zeros(0), np.zeros((0, 5, 2))
        return boxes.astype(float), scores.astype(float), landmarks.astype(float)

    return detect


def rgb_frame(picture):
    return Frame(planes=(np.ascontiguousarray(picture),), pixel_format="rgb24", color=RGB)


def decoded_frame(frame):
    planes = tuple(np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width] for p in frame.planes)
    return Frame(planes=planes, pixel_format=frame.format.name, color=ColorSpec(), native=frame)


def turned(picture, degrees, scale=1.0):
    height, width = picture.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, scale)
    return cv2.warpAffine(picture, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)


def iou(a, b):
    shared = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = np.maximum(shared, 0).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b))
    return shared / (area_a[:, None] + area_b - shared)


def face_scale(landmarks):
    """The larger of the eye distance and the distance from eyes to mouth: a profile's eyes are close."""
    down = landmarks[:, 3:].mean(1) - landmarks[:, :2].mean(1)
    across = landmarks[:, 1] - landmarks[:, 0]
    return np.maximum(np.linalg.norm(down, axis=-1), np.linalg.norm(across, axis=-1))


def compare(faces, expected):
    """Assert that both found the same faces; return the IoU and the relative landmark error of each."""
    boxes, scores, landmarks = expected
    # facenet-pytorch's faces lie about one pixel to the right and below: its crop of a box starts a pixel
    # before the box that the result is mapped by (`pad`, which also truncates).
    boxes, landmarks = boxes - 0.9, landmarks - 0.9
    overlap = iou(boxes, faces.boxes)
    sure = scores > 0.95
    assert (overlap.max(1, initial=0)[sure] > 0.6).all(), f"missed: {boxes[sure]} among {faces.boxes}"
    extra = overlap.max(0, initial=0)[faces.scores > 0.95] < 0.6
    assert not extra.any(), f"{extra.sum()} faces that the reference has not"
    if not sure.any():
        return np.zeros(0), np.zeros(0)
    match = overlap.argmax(1)[sure]
    error = np.linalg.norm(faces.landmarks[match] - landmarks[sure], axis=-1).mean(1)
    return overlap.max(1)[sure], error / face_scale(landmarks[sure])


@pytest.mark.parametrize(("degrees", "scale"), [(0, 1), (0, 0.5), (15, 1), (-20, 0.8), (0, 0.2)])
def test_same_faces_as_facenet_pytorch_on_the_astronaut(detector, reference, degrees, scale):
    picture = turned(data.astronaut(), degrees, scale)
    overlap, error = compare(detector.detect([rgb_frame(picture)]), reference(picture))
    assert len(overlap) == 1
    assert overlap.min() > 0.75
    assert error.max() < 0.12


def test_same_faces_as_facenet_pytorch_on_a_crowd(detector, reference):
    picture = np.zeros((420, 640, 3), np.uint8)
    for row, column, size in ((0, 0, 400), (0, 400, 240), (250, 400, 170)):
        tile = cv2.resize(data.astronaut(), (size, size), interpolation=cv2.INTER_AREA)
        picture[row : row + size, column : column + size] = tile
    overlap, error = compare(detector.detect([rgb_frame(picture)]), reference(picture))
    assert len(overlap) == 3
    assert overlap.mean() > 0.8
    assert error.mean() < 0.08


@pytest.mark.skipif(not MEDIA.is_dir(), reason=f"{MEDIA} is not there")
@pytest.mark.parametrize("name", ["photos", "street_crowd_1080p.mp4", "talking_head_1080.mp4"])
def test_same_faces_as_facenet_pytorch_on_real_media(detector, reference, name):
    if name == "photos":
        paths = [MEDIA / f"{stem}.jpg" for stem in ("group_photo", "obama-480p", "two_people")]
        pictures = [cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB) for path in paths]
        pairs = [(rgb_frame(picture), picture) for picture in pictures]
    else:
        with av.open(MEDIA / name) as container:
            decoded = list(islice(container.decode(video=0), 0, 61, 30))
        pairs = [(decoded_frame(frame), frame.to_ndarray(format="rgb24")) for frame in decoded]
    results = [compare(detector.detect([frame]), reference(picture)) for frame, picture in pairs]
    overlap, error = (np.concatenate(parts) for parts in zip(*results, strict=True))
    assert overlap.mean() > 0.85
    assert error.mean() < 0.06
    assert error.max() < 0.2


def test_fast_pnet_is_pnet(engine_store):
    import torch
    from facenet_pytorch.models.mtcnn import PNet

    engine = engine_store.load(detector_programs()[0])
    pixels = torch.rand(2, 3, 46, 70, generator=torch.Generator().manual_seed(0)) * 2 - 1
    network = PNet(pretrained=False)
    path = Path(sys.modules["facenet_pytorch"].__file__).parent / "data" / "pnet.pt"
    network.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        offsets, probabilities = network(pixels)
    got_offsets, got_score = engine(pixels.numpy())
    np.testing.assert_allclose(got_offsets, offsets, atol=1e-5)
    np.testing.assert_allclose(got_score[:, 0], probabilities[:, 1], atol=1e-5)


def yuv_frame(picture, pixel_format):
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format, dst_colorspace="ITU709")
    wide = "10le" in pixel_format
    planes = []
    for plane in frame.planes:
        samples = np.frombuffer(plane, np.uint16 if wide else np.uint8).reshape(plane.height, -1)
        if pixel_format == "nv12" and planes:
            planes.append(samples[:, : 2 * plane.width].reshape(plane.height, plane.width, 2))
        else:
            planes.append(samples[:, : plane.width])
    return Frame(planes=tuple(planes), pixel_format=pixel_format, color=ColorSpec(), native=frame)


@pytest.mark.parametrize("pixel_format", ["yuv420p", "nv12", "yuv444p", "yuv420p10le", "gray", "rgba", "rgb48"])
def test_pixel_formats_agree(detector, pixel_format):
    picture = data.astronaut()
    want = detector.detect([rgb_frame(picture)])
    if pixel_format == "gray":
        gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        frame = Frame(planes=(gray,), pixel_format="gray", color=RGB)
        want = detector.detect([rgb_frame(np.repeat(gray[..., None], 3, 2))])
    elif pixel_format == "rgba":
        alpha = np.zeros_like(picture[..., :1])
        frame = Frame(planes=(np.concatenate([picture, alpha], 2),), pixel_format="rgba", color=RGB)
    elif pixel_format == "rgb48":
        frame = Frame(planes=(picture.astype(np.uint16) * 257,), pixel_format="rgb48", color=RGB)
    else:
        frame = yuv_frame(picture, pixel_format)
    got = detector.detect([frame])
    assert len(got) == len(want) == 1
    assert iou(got.boxes, want.boxes)[0, 0] > 0.9
    assert np.abs(got.landmarks - want.landmarks).max() < 2.0
    assert got.scores[0] > 0.99


def test_batches_of_any_sizes_equal_single_frames(detector):
    astronaut = data.astronaut()
    pictures = [
        astronaut,
        data.chelsea(),
        cv2.resize(astronaut, (300, 300)),
        astronaut[:, ::-1],
        np.zeros((1, 1, 3), np.uint8),
    ]
    frames = [rgb_frame(picture) for picture in pictures]
    together = detector.detect(frames)
    assert together.frame_index.tolist() == sorted(together.frame_index.tolist())
    for index, frame in enumerate(frames):
        alone = detector.detect([frame])
        part = together[together.frame_index == index]
        assert len(alone) == len(part)
        np.testing.assert_allclose(part.landmarks, alone.landmarks, atol=1e-2)
    assert set(together.frame_index) >= {0, 2, 3}


def test_scores_fall_within_a_frame(detector):
    picture = np.concatenate([data.astronaut(), turned(data.astronaut(), 25)], 1)
    faces = detector.detect([rgb_frame(picture)] * 2)
    assert len(faces) == 4
    assert (np.diff(faces.scores.reshape(2, 2)) <= 0).all()


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (20, 20), (21, 3000), (24, 33), (3000, 22), (13, 12)])
def test_small_and_narrow_frames_have_no_face(detector, size):
    frame = rgb_frame(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8))
    assert len(detector.detect([frame])) == 0
    smallest = Detector(detector._pnet, detector._rnet, detector._onet, DetectConfig(min_face_px=12))
    assert isinstance(smallest.detect([frame]), Faces)


def test_nothing_in_nothing_out(detector):
    assert len(detector.detect([])) == 0
    assert len(detector.detect([rgb_frame(np.zeros((200, 300, 3), np.uint8))])) == 0
    assert len(detector.refine([], Faces.empty())) == 0


def test_refinement_stays_where_it_is(detector):
    frames = [rgb_frame(turned(data.astronaut(), degrees, scale)) for degrees, scale in ((0, 1), (15, 0.6), (-10, 0.3))]
    first = faces = detector.refine(frames, detector.detect(frames))
    assert len(faces) == 3
    for _ in range(30):
        faces = detector.refine(frames, faces)
    side = first.boxes[:, 3] - first.boxes[:, 1]
    assert (np.abs(faces.boxes - first.boxes).max(1) < 0.02 * side).all()
    assert (np.abs(faces.landmarks - first.landmarks).max((1, 2)) < 0.02 * side).all()
    assert (faces.scores > 0.99).all()


def test_refinement_follows_a_moving_face(detector):
    faces = detector.detect([rgb_frame(data.astronaut())])
    start = faces.landmarks[0]
    side = faces.boxes[0, 3] - faces.boxes[0, 1]
    step = np.array([0.08, 0.05]) * side
    for number in range(1, 6):
        matrix = np.float64([[1, 0, step[0] * number], [0, 1, step[1] * number]])
        moved = cv2.warpAffine(data.astronaut(), matrix, (512, 512), borderMode=cv2.BORDER_REPLICATE)
        faces = detector.refine([rgb_frame(moved)], faces)
        assert np.abs(faces.landmarks[0] - start - step * number).max() < 0.05 * side


def test_refinement_keeps_order_and_tells_where_no_face_is(detector):
    frames = [
        rgb_frame(data.astronaut()),
        rgb_frame(data.chelsea()[:, :200]),
        rgb_frame(data.astronaut()[:, ::-1]),
    ]
    face = detector.detect(frames[:1])[:1]
    mirrored = detector.detect(frames[2:])[:1]
    faces = Faces.concatenate([mirrored, face, face, face])
    faces.frame_index[:] = [2, 0, 1, 0]
    faces.boxes[3] += 10_000
    faces.landmarks[3] += 10_000
    refined = detector.refine(frames, faces)
    assert refined.frame_index.tolist() == [2, 0, 1, 0]
    assert (refined.scores[:2] > 0.99).all()
    assert (refined.scores[2:] < 0.7).all()
    assert iou(refined.boxes[:2], faces.boxes[:2]).diagonal().min() > 0.9


def test_limits_on_the_smallest_face(detector):
    assert DetectConfig().smallest_face_px(1920, 1080) == 27
    assert DetectConfig().smallest_face_px(640, 360) == 24
    assert DetectConfig(min_face_px=20).smallest_face_px(1920, 1080) == 20
    assert DetectConfig(min_face_px=20).smallest_face_px(6000, 4000) == pytest.approx(56.25)
    frame = rgb_frame(cv2.resize(data.astronaut(), (256, 256)))
    picky = Detector(detector._pnet, detector._rnet, detector._onet, DetectConfig(min_face_px=100))
    assert len(detector.detect([frame])) == 1
    assert len(picky.detect([frame])) == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"min_face_px": 11}, "at least 12"),
        ({"min_face_px": float("nan")}, "at least 12"),
        ({"max_picture_px": 13}, "at least 14"),
        ({"thresholds": (0.6, 0.7, 1.1)}, "three numbers"),
        ({"pyramid_factor": 1.0}, r"\[0.3, 0.83\]"),
        ({"max_batch": 0}, "at least 1"),
    ],
)
def test_config_checks_its_ranges(option, message):
    with pytest.raises(ValueError, match=message):
        DetectConfig(**option)


def test_stored_engines_need_no_torch(engine_store, detector):
    code = (
        "import sys; from pathlib import Path; from faceage.detect import load_detector;"
        "from faceage.engines.store import EngineStore;"
        f"load_detector(EngineStore(Path({str(engine_store.root)!r})));"
        "assert not {'torch', 'torchvision', 'facenet_pytorch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
