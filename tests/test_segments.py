"""Plans, segments and work folders: whatever a run is cut into, and wherever it ends early, the result is the same."""

import json
import os
import resource
import shutil
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from clips import frame_times, index_of, irregular_pts, make_clip, make_frame, packets_of, regular_pts

from faceage.align import align_faces
from faceage.errors import MediaError, UnsupportedError
from faceage.geometry import template_5
from faceage.media.segment import SegmentEncoder, SegmentWriter, open_segment
from faceage.media.video import EncodeOptions, VideoReader, VideoWriter, transcode
from faceage.pipeline.people import join_tracks
from faceage.pipeline.plan import choose_boundaries, fingerprint, load_plan, save_plan
from faceage.pipeline.render import AgedTrack, Renderer, decide
from faceage.pipeline.request import AgeCurve, AgeRequest, load_networks
from faceage.pipeline.scan import scan
from faceage.pipeline.timer import StageTimer
from faceage.pipeline.video import age_video, read_planned
from faceage.pipeline.work import locked, work_folder
from faceage.track import Track
from faceage.types import Appearance

LOSSLESS = EncodeOptions(codec="ffv1", overwrite=True)
REQUEST = AgeRequest(age=70, source_age=30)
CURVE = AgeRequest(curve=AgeCurve(((0, 40), (3, 70), (6, 70), (8, 20))), source_age=30)


def planes_of(frame):
    return [plane.copy() for plane in frame.planes]


def decoded(path):
    with VideoReader(path) as reader:
        return [planes_of(frame) for frame in reader]


def assert_same(left, right):
    assert len(left) == len(right)
    for number, (a, b) in enumerate(zip(left, right, strict=True)):
        for p, q in zip(a, b, strict=True):
            np.testing.assert_array_equal(p, q, err_msg=f"frame {number}")


# Segments of a video, without any network


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "ffv1"])
@pytest.mark.parametrize("cut", [7])
def test_segments_have_the_times_of_one_encoder(tmp_path, suffix, codec, cut):
    if (suffix, codec) in ((".ts", "ffv1"), (".mp4", "ffv1")):
        pytest.skip("the container does not hold it")
    pts = irregular_pts(40, start=90_000) if codec != "mpeg4" else regular_pts(40, start=90_000)
    # Steps of 4: a lossy encoder may move a flat area by a code or two, another on each CPU.
    clip = make_clip(tmp_path / f"in{suffix}", pts=pts, draw=lambda i: make_frame(4 * (i % 16)), audio="aac")
    options = EncodeOptions(codec=codec)
    transcode(clip, tmp_path / f"whole{suffix}", options)
    target = tmp_path / f"cut{suffix}"
    with VideoReader(clip) as reader, VideoWriter(target, reader, options) as writer:
        for number, frame in enumerate(reader):
            if number and number % cut == 0:
                writer.cut()
            writer.write(frame)
    assert frame_times(target) == frame_times(tmp_path / f"whole{suffix}")
    if suffix != ".mkv":  # Matroska keeps no decoding times
        stamps = [(p.dts, p.pts) for p in packets_of(target, "video")]
        assert all(a[0] < b[0] for a, b in pairwise(stamps))
        assert all(dts <= pts for dts, pts in stamps)
        assert [dts for dts, _ in stamps] == [p.dts for p in packets_of(tmp_path / f"whole{suffix}", "video")]
    with VideoReader(target) as reader:
        assert [round(index_of(frame.planes[0]) / 4) for frame in reader] == [i % 16 for i in range(40)]
    assert [bytes(p) for p in packets_of(target, "audio")] == [bytes(p) for p in packets_of(clip, "audio")]


@pytest.mark.parametrize("codec", ["libx264", "ffv1"])
def test_segments_on_disk_give_what_segments_in_one_go_give(tmp_path, codec):
    clip = make_clip(tmp_path / "in.mkv", pts=irregular_pts(40), draw=lambda i: make_frame(i % 16))
    options = EncodeOptions(codec=codec)
    with VideoReader(clip) as reader, VideoWriter(tmp_path / "direct.mkv", reader, options) as writer:
        for number, frame in enumerate(reader):
            if number in (13, 20):
                writer.cut()
            writer.write(frame)
    with VideoReader(clip) as reader, VideoWriter(tmp_path / "disk.mkv", reader, options) as writer:
        frames = list(reader)
        writer.begin(frames[0].pts)
        for name, first, last in (("2", 20, 40), ("0", 0, 13), ("1", 13, 20)):  # in any order
            encoder, out = SegmentEncoder(writer.segment_format()), SegmentWriter(tmp_path / name)
            for frame in frames[first:last]:
                out.write(encoder.encode(frame))
            assert open_segment(tmp_path / name) is None
            out.write(encoder.finish())
            out.finish(encoder.ticks, {"mine": np.arange(3)})
        for name in "012":
            segment = open_segment(tmp_path / name)
            assert segment.notes["mine"].tolist() == [0, 1, 2]
            writer.add(segment)
    # On a busy machine one x264 stream of a hundred has other bytes than the rest, by one thread too.
    direct, disk = (
        [
            (bytes(p) if codec == "ffv1" else b"", p.pts, p.dts, p.duration, p.is_keyframe)
            for p in packets_of(tmp_path / f"{name}.mkv", "video")
        ]
        for name in ("direct", "disk")
    )
    assert direct == disk
    with open(tmp_path / "1.packets", "r+b") as file:
        file.truncate(100)
    assert open_segment(tmp_path / "1") is None


def test_frames_that_never_come_out_are_said(tmp_path):
    clip = make_clip(tmp_path / "in.mkv", pts=regular_pts(4))

    def lose_one():
        with VideoReader(clip) as reader, VideoWriter(tmp_path / "out.mkv", reader) as writer:
            for frame in reader:
                writer.write(frame)
            writer._segment.ticks.append(10**6)

    with pytest.raises(MediaError, match="1 of 5 frames did not come out of libx264"):
        lose_one()
    assert os.listdir(tmp_path) == ["in.mkv"]


def nodding_track(eyes_px, depth):
    """A face whose nose and mouth go down by a share of the distance of the eyes and come back, in frames 26 to 34."""
    frames = np.arange(49)
    down = depth * eyes_px * np.clip(1 - np.abs(frames - 25) / 4, 0, 1)
    landmarks = np.repeat(template_5(eyes_px * 3)[None] + 100, len(frames), 0)
    landmarks[:, 2:, 1] += down[:, None]
    landmarks = landmarks.astype(np.float32)
    return AgedTrack(
        track=Track(
            track_id=0,
            shot=0,
            first_frame=5,
            landmarks=landmarks,
            scores=np.ones(49, np.float32),
            starts_shot=True,
            ends_shot=True,
        ),
        person=1,
        appearance=Appearance(embedding=np.ones(4, np.float32), thumbnail=np.zeros((3, 16, 16), np.float32)),
        source_age=30.0,
        target_ages=np.full(49, 70, np.float32),
        sizes_px=(256,),
        frame_to_crop=(align_faces(landmarks, 256),),
        weights=np.ones(49, np.float32),
    )


def test_quick_turns_of_large_faces_get_more_key_frames():
    regular = [5, 12, 24, 36, 48, 53]
    assert nodding_track(100, 0.0).key_frames() == regular
    assert nodding_track(30, 0.15).key_frames() == regular  # too small to be seen
    more = nodding_track(100, 0.15).key_frames()
    assert set(regular) < set(more)
    assert all(24 < frame < 36 for frame in set(more) - set(regular))
    assert min(b - a for a, b in pairwise(more)) >= 3


def test_boundaries_lie_at_shots_where_there_are_some_and_else_at_key_frames():
    none = np.array([0])
    assert choose_boundaries(700, none).tolist() == [0, 700]
    assert choose_boundaries(1600, none).tolist() == [0, 504, 1008, 1600]
    assert choose_boundaries(1600, np.array([0, 30, 490, 1111])).tolist() == [0, 490, 1111, 1600]
    assert choose_boundaries(0, none).tolist() == [0, 0]
    for seed in range(50):
        rng = np.random.default_rng(seed)
        count = int(rng.integers(1, 5000))
        shots = np.unique([0, *rng.integers(0, count, 12)])
        edges = choose_boundaries(count, shots, 96)
        assert (edges[0], edges[-1]) == (0, count)
        assert len(edges) == 2 or np.diff(edges).min() >= 48
        assert np.diff(edges).max() < 144 or len(edges) == 2
        assert all(edge % 12 == 0 or edge in shots for edge in edges[:-1])


# People


def some_track(number, first, last, shot=0):
    count = last - first + 1
    return Track(
        track_id=number, shot=shot, first_frame=first, landmarks=np.zeros((count, 5, 2), np.float32),
        scores=np.ones(count, np.float32), starts_shot=True, ends_shot=True,
    )  # fmt: skip


def looking(*embedding):
    vector = np.array(embedding, np.float32)
    return Appearance(embedding=vector / np.linalg.norm(vector), thumbnail=np.zeros((3, 16, 16), np.float32))


def test_tracks_are_joined_over_shots_but_never_of_two_at_the_same_time():
    she, he, other = looking(1, 0, 0), looking(0, 1, 0), looking(0, 0, 1)
    tracks = [
        some_track(0, 0, 9),
        some_track(1, 5, 9),
        some_track(2, 10, 19, shot=1),
        some_track(3, 10, 19, shot=1),
        some_track(4, 20, 29, shot=2),
        some_track(5, 40, 49, shot=2),
    ]
    looks = [she, he, looking(0.1, 1, 0), looking(1, 0.1, 0), other, looking(0.2, 0.1, 1)]
    assert join_tracks(tracks, looks) == [1, 2, 2, 1, 3, 3]
    twins = [she] * 2
    assert join_tracks(tracks[:2], twins) == [1, 2]
    # The likest pair comes first, whoever appears first.
    assert join_tracks([tracks[0], tracks[2], tracks[3]], [she, looking(1, 0.5, 0), she]) == [1, 2, 1]
    assert join_tracks([], []) == []


# Plans and rendering


@pytest.fixture(scope="module")
def space(tiny_model):
    """The bundled space model."""
    return load_networks(model="space")


def test_a_plan_comes_back_as_it_was(networks, long_clip, long_plan, tmp_path):
    assert long_plan.frame_count == 228
    assert long_plan.segment_count == 2
    assert long_plan.people().keys() == {1}
    save_plan(long_plan, tmp_path / "plan")
    again = load_plan(tmp_path / "plan")
    assert fingerprint(again) == fingerprint(long_plan)
    assert again.time_base == Fraction(1, 90_000)
    np.testing.assert_array_equal(again.tracks[0].track.landmarks, long_plan.tracks[0].track.landmarks)
    np.testing.assert_array_equal(again.tracks[0].appearance.embedding, long_plan.tracks[0].appearance.embedding)
    # It holds no picture: it is far smaller than one frame.
    with np.load(tmp_path / "plan" / "plan.npz") as arrays:
        assert sum(a.nbytes for name, a in arrays.items() if name != "landmarks") < 256 * 256
    facts = json.loads((tmp_path / "plan" / "plan.json").read_text())
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(facts | {"format_version": 99}))
    with pytest.raises(MediaError, match="has format 99, expected 1; scan the video again"):
        load_plan(tmp_path / "plan")
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(facts))
    (tmp_path / "plan" / "plan.npz").write_bytes(b"PK")
    with pytest.raises(MediaError, match="is damaged"):
        load_plan(tmp_path / "plan")
    (tmp_path / "plan" / "plan.json").write_text("{" * 9)
    with pytest.raises(MediaError, match="is damaged"):
        load_plan(tmp_path / "plan")
    with pytest.raises(MediaError, match="make one with `faceage scan`"):
        load_plan(tmp_path / "nothing")


def test_a_video_without_faces_has_a_plan_too(networks, tmp_path):
    clip = make_clip(tmp_path / "in.mkv", pts=irregular_pts(5), size=(96, 96))
    with VideoReader(clip) as reader:
        plan = scan(networks, reader)
    save_plan(plan, tmp_path)
    assert fingerprint(load_plan(tmp_path)) == fingerprint(plan)
    assert plan.tracks == ()
    assert plan.pts.tolist() == [round(t * 1000) for t in frame_times(clip)]


@pytest.mark.parametrize(
    ("which", "wish"),
    [("networks", REQUEST), ("networks", CURVE), ("facegan", REQUEST), ("facegan", CURVE), ("space", CURVE)],
    ids=["age-cgan-age", "age-cgan-curve", "facegan-age", "facegan-curve", "space-curve"],
)
def test_a_stretch_is_rendered_alike_however_the_video_is_cut(which, wish, request, long_clip, long_plan):
    networks = request.getfixturevalue(which)
    plan = replace(long_plan, boundaries=np.array([0, 84, 156, 228]))
    tracks = decide(networks, plan, wish)

    def render(first, last):
        low, high = (int(plan.boundaries[i]) for i in (first, last))
        renderer = Renderer(networks, plan, tracks, StageTimer())
        with VideoReader(long_clip) as reader:
            frames = read_planned(plan, reader, renderer.begin(low), min(high + 1, 228))
            return [planes_of(frame) for frame in renderer.render(frames, low, high)], renderer.identities

    whole, identities = render(0, 3)
    parts = {first: render(first, first + 1) for first in (2, 0, 1)}
    assert_same(whole, [frame for first in range(3) for frame in parts[first][0]])
    assert identities == parts[0][1]
    assert_same(whole[84:], render(1, 3)[0])
    source = decoded(long_clip)
    changed = [(a[0] != b[0]).any() for a, b in zip(whole, source, strict=True)]
    assert all(changed) if wish is REQUEST else sum(changed) > 200  # the curve crosses the present age


def test_the_wanted_age_may_move_in_time(facegan, long_clip, long_plan, tmp_path):
    """From the present age to another and back: the change grows from nothing, without steps, and goes again."""
    curve = AgeCurve(((0, 30), (3, 30), (6, 80), (9, 30)))
    target = tmp_path / "out.mkv"
    wish = AgeRequest(curve=curve, source_age=30)
    report = age_video(facegan, long_clip, target, wish, plan=long_plan, encode=LOSSLESS)
    (person,) = report.people
    assert (person.source_age, person.target_age_first) == (30, 30)
    assert person.target_age == pytest.approx(float(curve.at(227 / 25)), abs=0.06)
    pairs = zip(decoded(long_clip), decoded(target), strict=True)
    change = np.array([np.abs(after[0].astype(int) - before[0]).mean() for before, after in pairs])
    there = decide(facegan, long_plan, AgeRequest(age=80, source_age=30))
    assert there[0].target_ages.tolist() == [80] * 228
    assert change[150] > 1.5 * change[90]
    assert change[150] > 1.5 * change[210]
    assert np.abs(np.diff(change)).max() < 0.2 * np.ptp(change)


def test_no_jump_is_seen_where_an_ager_that_remembers_begins_anew(networks, long_clip, long_plan, monkeypatch):
    """What is seen of the new beginning is a small part of what would be seen without a warm-up."""
    plan = replace(long_plan, boundaries=np.array([0, 120, 228]))
    source = [planes[0].astype(int) for planes in decoded(long_clip)]

    def steps():
        with VideoReader(long_clip) as reader:
            renderer = Renderer(networks, plan, decide(networks, plan, REQUEST), StageTimer())
            frames = renderer.render(read_planned(plan, reader, 0, 228), 0, 228)
            change = [frame.planes[0].astype(int) - before for frame, before in zip(frames, source, strict=True)]
        return np.array([np.abs(b - a).mean() for a, b in pairwise(change)])

    warm = steps()
    monkeypatch.setattr(networks.ager, "warm_up_keys", 0)
    assert warm[119] < 0.7 * steps()[119]


def test_another_video_s_plan_is_refused(networks, face_clip, long_clip, long_plan, tmp_path):
    with pytest.raises(MediaError, match=r"the plan is not of .*face\.mp4 as it is now; scan it again"):
        age_video(networks, face_clip, tmp_path / "out.mkv", REQUEST, plan=long_plan)
    with pytest.raises(MediaError, match=r"range None to None s, 1 to None s is asked for"):
        age_video(networks, long_clip, tmp_path / "out.mkv", REQUEST, plan=long_plan, start_s=1)
    others = replace(long_plan, estimators={"age": "x", "identity": "y"})
    with pytest.raises(MediaError, match="made with other networks for age and identity"):
        age_video(networks, long_clip, tmp_path / "out.mkv", REQUEST, plan=others)
    assert os.listdir(tmp_path) == []


# Runs that end early


class StopEarlyError(Exception):
    """What ends a run early in these tests."""


def stop_at(stage, frame):
    def progress(now, done, total):
        if now == stage and done >= frame:
            raise StopEarlyError

    return progress


@pytest.fixture(scope="module")
def uninterrupted(networks, long_clip, long_plan, tmp_path_factory):
    target = tmp_path_factory.mktemp("whole") / "out.mkv"
    report = age_video(networks, long_clip, target, REQUEST, plan=long_plan, encode=LOSSLESS, resume=False)
    assert os.listdir(target.parent) == ["out.mkv"]
    return decoded(target), report, frame_times(target)


def test_the_same_call_goes_on_where_a_run_ended(networks, long_clip, long_plan, uninterrupted, tmp_path):
    frames, report, times = uninterrupted
    target = tmp_path / "out.mkv"
    options = {"plan": long_plan, "encode": LOSSLESS}
    with pytest.raises(StopEarlyError):
        age_video(networks, long_clip, target, REQUEST, progress=stop_at("render", 150), **options)
    folder = work_folder(target, None)
    assert sorted(os.listdir(tmp_path)) == [folder.name]
    assert open_segment(folder / "000000") is not None
    assert open_segment(folder / "000001") is None
    seen = []
    again = age_video(networks, long_clip, target, REQUEST, progress=lambda *now: seen.append(now), **options)
    assert {stage for stage, *_ in seen} == {"render"}
    assert seen[0][1] == long_plan.boundaries[1] + 12
    assert os.listdir(tmp_path) == ["out.mkv"]
    assert_same(decoded(target), frames)
    assert frame_times(target) == times
    assert [bytes(p) for p in packets_of(target, "audio")] == [bytes(p) for p in packets_of(long_clip, "audio")]
    assert (again.people, again.frames_with_faces) == (report.people, report.frames_with_faces)


def test_what_was_scanned_is_not_scanned_again(networks, long_clip, tmp_path):
    target = tmp_path / "out.mkv"
    with pytest.raises(StopEarlyError):
        age_video(networks, long_clip, target, REQUEST, encode=LOSSLESS, end_s=1, progress=stop_at("render", 1))
    seen = set()
    age_video(
        networks, long_clip, target, REQUEST, encode=LOSSLESS, end_s=1, progress=lambda stage, *_: seen.add(stage)
    )
    assert seen == {"render"}
    assert len(decoded(target)) == 25


def test_uneven_times_are_not_given_to_a_container_without_times(networks, tmp_path):
    uneven = make_clip(tmp_path / "in.mkv", pts=irregular_pts(8))
    even = make_clip(tmp_path / "even.mkv", time_base=Fraction(1, 1000), pts=[round(i * 1001 / 30) for i in range(8)])
    with pytest.raises(UnsupportedError, match=r"uneven times, and \.h264 files keep no times; name the output \.mkv"):
        age_video(networks, uneven, tmp_path / "out.h264", REQUEST)
    assert sorted(os.listdir(tmp_path)) == ["even.mkv", "in.mkv"]
    age_video(networks, even, tmp_path / "out.h264", REQUEST)
    assert len(decoded(tmp_path / "out.h264")) == 8


def test_a_full_disk_is_one_line_and_the_run_can_go_on(networks, long_clip, long_plan, uninterrupted, tmp_path):
    target = tmp_path / "out.mkv"
    options = {"plan": long_plan, "encode": LOSSLESS}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # a write beyond fails, as on a full disk
    try:
        with pytest.raises(MediaError, match=r"faceage-work cannot be written \(.*goes on where this one ended"):
            age_video(networks, long_clip, target, REQUEST, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["out.mkv.faceage-work"]
    age_video(networks, long_clip, target, REQUEST, **options)
    assert_same(decoded(target), uninterrupted[0])


def test_room_is_looked_for_ahead(networks, long_clip, tmp_path, monkeypatch, caplog):
    def disk(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free))

    target, size = tmp_path / "out.mkv", long_clip.stat().st_size
    disk(size // 10)
    with pytest.raises(MediaError, match=r"has 0\.0 MB free, and about 0\.\d MB are to be written there; free space"):
        age_video(networks, long_clip, target, REQUEST)
    assert os.listdir(tmp_path) == []
    disk(size)
    age_video(networks, long_clip, target, REQUEST, end_s=8)
    assert "are to be written there, if outputs are as large as their sources" in caplog.text


def test_other_options_start_over_and_say_so(networks, long_clip, tmp_path, caplog):
    target = tmp_path / "out.mkv"
    for age in (70, 60):
        with pytest.raises(StopEarlyError):
            age_video(networks, long_clip, target, AgeRequest(age=age), end_s=0.4, progress=stop_at("render", 1))
    assert caplog.messages == [f"{work_folder(target, None)} is of a run with another options; starting over"]
    (work_folder(target, None) / "manifest.json").write_text("[[[")
    age_video(networks, long_clip, target, AgeRequest(age=60), end_s=0.4)
    assert os.listdir(tmp_path) == ["out.mkv"]


def test_a_second_run_on_one_output_is_refused(networks, long_clip, tmp_path):
    target = tmp_path / "out.mkv"
    with locked(target), pytest.raises(MediaError, match=rf"written by another run \(process {os.getpid()}\); wait"):
        age_video(networks, long_clip, target, REQUEST)
    (tmp_path / ".out.mkv.lock").write_text("1\n")  # of a process that died
    age_video(networks, long_clip, target, REQUEST, end_s=0.2)
    assert os.listdir(tmp_path) == ["out.mkv"]


def test_what_killed_runs_left_is_named_and_deleted(networks, long_clip, tmp_path, caplog):
    dead, alive = (tmp_path / f".out.{pid}.part.mkv" for pid in (2**22 + 1, os.getppid()))
    dead.touch()
    alive.touch()
    age_video(networks, long_clip, tmp_path / "out.mkv", REQUEST, end_s=0.2)
    assert caplog.messages == [f"{dead} was left by a run that was killed; it is deleted"]
    assert sorted(os.listdir(tmp_path)) == [alive.name, "out.mkv"]


def test_the_work_folder_may_lie_elsewhere(networks, long_clip, tmp_path):
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "out.mkv"
    with pytest.raises(StopEarlyError):
        age_video(
            networks, long_clip, target, REQUEST, end_s=0.2, work=tmp_path / "work", progress=stop_at("render", 1)
        )
    assert os.listdir(tmp_path / "out") == []
    assert os.listdir(tmp_path / "work") == ["out.mkv.faceage-work"]
    age_video(networks, long_clip, target, REQUEST, end_s=0.2, work=tmp_path / "work")
    assert os.listdir(tmp_path / "work") == []


def test_people_are_aged_one_by_one(networks, long_clip, long_plan, tmp_path):
    report = age_video(
        networks, long_clip, tmp_path / "out.mkv", None, people={1: AgeRequest(by=20)}, plan=long_plan, encode=LOSSLESS
    )
    (person,) = report.people
    assert person.target_age == pytest.approx(person.source_age + 20, abs=0.11)
    kept = age_video(networks, long_clip, tmp_path / "kept.mp4", AgeRequest(age=70), people={1: None}, plan=long_plan)
    assert (kept.people[0].target_age, kept.frames_with_faces) == (None, 0)
    assert (tmp_path / "kept.mp4").read_bytes() == long_clip.read_bytes()
