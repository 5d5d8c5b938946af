"""The detector against facenet-pytorch's MTCNN, and what a tracker and a pipeline rely on.

Which proposal wins in MTCNN hangs on single grey levels, so only the same arithmetic on the same pixels gives the
same boxes; with it, they agree to an IoU of 1.000 (49 faces of the photos and clips, at full size). Facenet-pytorch's
own boxes in two RGB conversions of the same video frames, FFmpeg's fast one and its accurate one, overlap by more
than 0.9 for only 81 % of 81 faces (mean 0.94, worst 0.81), and for 77 % when a picture is shifted by (3, 2) pixels.
Ours from the native planes, which no 8-bit RGB equals, agree with those of the accurate conversion for 96 % of 84
(mean 0.97, worst 0.80). The landmarks are ours (`LOOKS` in detect.py), so they differ a little everywhere.
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
from faceage.engines.registry import choose_runtime
from faceage.engines.store import EngineStore
from faceage.networks.mtcnn import pnet_program
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
    """facenet-pytorch's MTCNN: picture and smallest face to (boxes, scores, landmarks)."""
    networks = pytest.importorskip("facenet_pytorch").MTCNN(keep_all=True, device="cpu")

    def detect(picture, min_face_px=20):
        networks.min_face_size = min_face_px
        boxes, scores, landmarks = networks.detect(picture, landmarks=True)
        if boxes is None:
            return np.zeros((0, 4)), np.zeros(0), np.zeros((0, 5, 2))
        return boxes.astype(float), scores.astype(float), landmarks.astype(float)

    return detect


def rgb_frame(picture):
    return Frame(planes=(np.ascontiguousarray(picture),), pixel_format="rgb24", color=RGB)


def decoded_frame(frame, matrix="bt709"):
    planes = tuple(np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width] for p in frame.planes)
    return Frame(planes=planes, pixel_format=frame.format.name, color=ColorSpec(matrix=matrix), native=frame)


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


SURE = 0.98
"""Face probability above which a face must be found by both."""


def compare(faces, expected):
    """Return the IoU of each sure face of either side with the nearest of the other, and the landmarks' errors."""
    boxes, scores, landmarks = expected
    # facenet-pytorch's boxes are edges, for it cuts pictures by them; its landmarks are about a pixel to the right and
    # below, for its crop of a box starts up to a pixel before the box that the result is mapped by (`pad`).
    overlap = iou(boxes - 0.5, faces.boxes)
    sure = scores > SURE
    theirs, ours = overlap.max(1, initial=0)[sure], overlap.max(0, initial=0)[faces.scores > SURE]
    found = sure & (overlap.max(1, initial=0) > 0.5)
    error = np.linalg.norm(faces.landmarks[overlap[found].argmax(1)] - landmarks[found] + 0.9, axis=-1).mean(1)
    return np.concatenate([theirs, ours]), error / face_scale(landmarks[found])


@pytest.mark.parametrize(("degrees", "scale"), [(0, 1), (0, 0.5), (15, 1), (-20, 0.8), (0, 0.2), (30, 1.2)])
def test_same_faces_as_facenet_pytorch_on_the_astronaut(detector, reference, degrees, scale):
    picture = turned(data.astronaut(), degrees, scale)
    overlap, error = compare(detector.detect([rgb_frame(picture)]), reference(picture))
    assert len(overlap) >= 2
    assert overlap.min() > 0.9
    assert error.max() < 0.12


@pytest.mark.parametrize("corner", [(75, 0), (0, 195), (80, 190), (91, 101)])
def test_same_faces_as_facenet_pytorch_at_the_edge(detector, reference, corner):
    picture = data.astronaut()[corner[0] :, corner[1] :]
    overlap, _ = compare(detector.detect([rgb_frame(picture)]), reference(picture))
    assert len(overlap) >= 2
    assert overlap.min() > 0.9


def test_same_faces_as_facenet_pytorch_on_a_crowd(detector, reference):
    picture = np.zeros((420, 640, 3), np.uint8)
    for row, column, size in ((0, 0, 400), (0, 400, 240), (250, 400, 170)):
        tile = cv2.resize(data.astronaut(), (size, size), interpolation=cv2.INTER_AREA)
        picture[row : row + size, column : column + size] = tile
    overlap, error = compare(detector.detect([rgb_frame(picture)]), reference(picture))
    assert len(overlap) == 6
    assert overlap.min() > 0.9
    assert error.mean() < 0.08


def clip_frames(name, every):
    with av.open(MEDIA / name) as container:
        yield from islice(container.decode(video=0), 0, None, every)


CLIPS = [("street_crowd_1080p.mp4", "bt709", 35), ("talking_head_1080.mp4", "bt601", 125)]
"""Name, colour matrix, and which frames are sampled."""


@pytest.mark.skipif(not MEDIA.is_dir(), reason=f"{MEDIA} is not there")
@pytest.mark.parametrize("name", ["photos", *(name for name, _, _ in CLIPS)])
def test_same_faces_as_facenet_pytorch_on_real_media(engine_store, reference, name):
    if name == "photos":
        pictures = [cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB) for path in sorted(MEDIA.glob("*.jpg"))]
    else:
        every = next(every for clip, _, every in CLIPS if clip == name)
        pictures = [frame.to_ndarray(format="rgb24") for frame in clip_frames(name, every)]
    detector = load_detector(engine_store)
    overlaps, errors = [], []
    for picture in pictures:
        smallest = detector.config.smallest_face_px(*picture.shape[1::-1])
        overlap, error = compare(detector.detect([rgb_frame(picture)]), reference(picture, smallest))
        overlaps.append(overlap)
        errors.append(error)
    overlap, error = np.concatenate(overlaps), np.concatenate(errors)
    assert len(overlap) >= 2 * len(pictures)
    assert overlap.min() > 0.9
    assert overlap.mean() > 0.98
    assert error.mean() < 0.06
    assert error.max() < 0.2


def accurate_rgb(frame, matrix):
    """Return FFmpeg's RGB of a frame without its short cuts, which are up to three grey levels off."""
    graph = av.filter.Graph()
    flags = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
    nodes = [
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base),
        graph.add("scale", f"in_color_matrix={matrix}:in_range=tv:out_range=pc:flags={flags}"),
        graph.add("format", "rgb24"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*nodes).configure()
    graph.push(frame)
    return graph.pull().to_ndarray()


@pytest.mark.skipif(not MEDIA.is_dir(), reason=f"{MEDIA} is not there")
def test_native_planes_agree_better_than_two_rgb_conversions(engine_store, reference):
    detector = load_detector(engine_store)
    ours, theirs = [], []
    for name, matrix, every in CLIPS:
        for frame in clip_frames(name, every):
            smallest = detector.config.smallest_face_px(frame.width, frame.height)
            accurate = reference(accurate_rgb(frame, matrix), smallest)
            ours.append(compare(detector.detect([decoded_frame(frame, matrix)]), accurate)[0])
            fast_boxes, fast_scores, _ = reference(frame.to_ndarray(format="rgb24"), smallest)
            theirs.append(iou(fast_boxes, accurate[0]).max(1, initial=0)[fast_scores > SURE])
    ours, theirs = np.concatenate(ours), np.concatenate(theirs)
    assert ours.min() > 0.75
    assert ours.mean() > max(0.95, theirs.mean())
    assert (ours > 0.9).mean() > 0.85


def test_large_frames(detector, monkeypatch):
    # The largest of the smallest faces for which a frame is not halved.
    detector = Detector(detector._pnet, detector._rnet, detector._onet, DetectConfig(min_face_px=47))
    want = detector.detect([rgb_frame(data.astronaut())])
    white = np.full((3000, 3000, 3), 255, np.uint8)
    white[-512:, -512:] = data.astronaut()  # where the sums have passed 2^31
    faces = detector.detect([rgb_frame(white)])
    assert iou(faces.boxes - 2488, want.boxes)[:, 0].max() > 0.8
    monkeypatch.setattr("faceage.detect.MAX_SUMMED_PIXELS", 100_000)
    shrunk = detector.detect([rgb_frame(data.astronaut())])
    assert len(shrunk) == 1
    assert iou(shrunk.boxes, want.boxes)[0, 0] > 0.8
    assert np.abs(shrunk.landmarks - want.landmarks).max() < 2.0


def test_halved_frames_show_the_same_faces(detector, monkeypatch):
    frame = rgb_frame(cv2.resize(data.astronaut(), (1536, 1536)))
    config = DetectConfig(min_face_px=60)
    coarse = Detector(detector._pnet, detector._rnet, detector._onet, config)
    halved = coarse.detect([frame])
    monkeypatch.setattr("faceage.detect.SHRUNK_FACE_PX", 1000)
    whole = coarse.detect([frame])
    assert len(halved) == len(whole) >= 1
    assert not np.array_equal(halved.boxes, whole.boxes)
    assert iou(halved.boxes, whole.boxes).max(1).min() > 0.9
    height = whole.boxes[0, 3] - whole.boxes[0, 1]
    assert np.abs(halved.landmarks[0] - whole.landmarks[0]).max() < 0.02 * height


def test_proposals_for_halved_frames_are_made_in_the_runtimes_own_precision(detector, engine_store):
    """The coarse P-Net is opened when the first large frame comes, and the same faces are found with it."""
    coarse = engine_store.load(pnet_program(exact=False), choose_runtime(device="cpu"))
    assert coarse.backend == "openvino"
    asked = []
    engines = detector._pnet, detector._rnet, detector._onet
    half = Detector(*engines, DetectConfig(min_face_px=60), lambda: asked.append("P-Net") or coarse)
    half.detect([rgb_frame(data.astronaut()[:256, :256])])
    assert not asked
    frame = rgb_frame(cv2.resize(data.astronaut(), (1536, 1536)))
    found, want = half.detect([frame]), Detector(*engines, half.config).detect([frame])
    assert asked
    assert len(found) == len(want) == 1
    assert iou(found.boxes, want.boxes)[0, 0] > 0.9
    assert np.abs(found.landmarks - want.landmarks).max() < 0.005 * (want.boxes[0, 3] - want.boxes[0, 1])


@pytest.mark.parametrize("side", [24, 25, 27, 37, 49, 98, 103])
def test_frames_as_small_as_the_smallest_face(engine_store, side):
    frame = rgb_frame(cv2.resize(data.astronaut(), (side, side)))
    smallest = load_detector(engine_store, DetectConfig(min_face_px=side))
    assert isinstance(smallest.detect([frame]), Faces)


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
    # From the cascade's box, which hangs on its proposal, it settles first.
    first = faces = detector.refine(frames, detector.refine(frames, detector.detect(frames)))
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
    picky = Detector(detector._pnet, detector._rnet, detector._onet, DetectConfig(min_face_px=150))
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
