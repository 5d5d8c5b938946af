"""Age the faces of a video: scan it, render it, and write it like the source was."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np

from faceage.align import face_quality
from faceage.checkpoint import sha256_of
from faceage.errors import MediaError
from faceage.kernels import computing
from faceage.media.probe import read_comment
from faceage.media.segment import SegmentEncoder, SegmentFormat, SegmentWriter, open_segment
from faceage.media.video import EncodeOptions, VideoReader, VideoWriter, check_output
from faceage.pipeline.label import describe_people, label_comment, label_fields
from faceage.pipeline.plan import KEY_EVERY_FRAMES, Plan, PlannedTrack, fingerprint, load_plan, person_age
from faceage.pipeline.render import AgedTrack, People, Renderer, decide
from faceage.pipeline.report import PersonReport, VideoReport
from faceage.pipeline.request import AgeRequest, Networks
from faceage.pipeline.scan import Progress, scan
from faceage.pipeline.threads import WriteBehind, read_ahead, timed
from faceage.pipeline.timer import Span, StageTimer
from faceage.pipeline.work import WorkFolder, check_space, full, locked, segment_path, versions, work_folder
from faceage.pipeline.workers import Here, Worker, Workers
from faceage.track import TrackConfig
from faceage.types import Frame

FACE_BOX = (1.15, 1.4)
"""Half the width and height of a face's box, in the larger side of the box of its landmarks."""
QUEUED_FRAMES = 4
"""Frames decoded ahead, and frames waiting for the encoder: enough to keep three threads busy."""


def age_video(
    networks: Networks,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    request: AgeRequest | None,
    *,
    people: People | None = None,
    plan: Plan | None = None,
    encode: EncodeOptions | None = None,
    track: TrackConfig | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    resume: bool = True,
    work: Path | None = None,
    workers: Workers | None = None,
    label: bool = True,
    trace: Path | None = None,
    progress: Progress | None = None,
) -> VideoReport:
    """Age the faces of a video and write it like the source was.

    A run that ends early leaves a work folder beside the output, and the same call goes on where it ended.

    Args:
        networks: from `load_networks`.
        source: the video.
        target: the output; it appears when it is complete.
        request: how everybody is aged whom `people` does not name; None: they stay as they are.
        people: how people are aged, by their numbers in the plan.
        plan: what `scan` found; None: the video is scanned first.
        encode: how the output is encoded.
        track: how faces are followed, if the video is scanned.
        start_s: frames before this time are left out.
        end_s: frames from this time on are left out.
        resume: keep what is finished in a work folder until the output is complete.
        work: the folder that the work folder lies in; None: the output's.
        workers: what renders the segments; None: this process.
        label: mark the output as partly synthetic, in its comment; a copy of the source is not marked.
        trace: a file that gets a trace of all stages, in Chrome's format.
        progress: called now and then, from this thread.

    Raises:
        MediaError: if the source is no video, the plan is another one's, another run writes the output, or it cannot be
            written.
        UnsupportedError: for a pixel format or container that cannot be used.
    """
    start = perf_counter()
    timer = StageTimer(networks.device, traces=trace is not None)
    source, target = Path(source), Path(target)
    encode = encode or EncodeOptions()
    workers = workers or Here(networks)
    if label:
        fields = label_fields(networks, describe_people(request, people or {}))
        encode = replace(encode, metadata={**encode.metadata, "comment": label_comment(read_comment(source), fields)})
    wish = {"everybody": request, "people": people or {}, "track": track or TrackConfig()}
    with (
        computing(networks.device),
        VideoReader(source, start_s=start_s, end_s=end_s, device=networks.device) as first_pass,
        VideoReader(source, start_s=start_s, end_s=end_s, device=networks.device) as second_pass,
        locked(check_output(target, [source], overwrite=encode.overwrite)),
    ):
        # The writer is opened before the long scan, so that an output that cannot be written is known at once.
        with VideoWriter(target, second_pass, encode) as writer:
            sha256 = sha256_of(source)
            if plan is not None:
                _check_plan(plan, networks, first_pass, sha256)
                writer.check_times(plan.pts)
            folder: WorkFolder | None = None
            if resume or workers.count > 1:
                manifest = _manifest(networks, first_pass, sha256, plan, wish, writer)
                folder = WorkFolder(work_folder(target, work), manifest, fresh=not resume)
                plan = plan or folder.plan()
            try:
                _check_space(second_pass, target, folder)
                if plan is None:
                    found = scan(networks, first_pass, track, sha256=sha256, timer=timer, progress=progress)
                    writer.check_times(found.pts)
                    plan = found
                if folder:
                    folder.save(plan)
                tracks = decide(networks, plan, request, people)
                job = _Job(networks, plan, tracks, second_pass, writer, timer, progress or (lambda *_: None))
                if not any(aged.weights.any() for aged in tracks) and writer.can_copy_source:
                    writer.copy_source()
                    identities = {}
                elif folder and plan.segment_count > 1:
                    identities = job.render_segments(folder.path, workers, request, people or {})
                else:
                    identities = job.render_whole()
            except BaseException:
                if folder and (plan is None or not resume):
                    folder.remove()  # there is nothing to go on with
                raise
        if folder:
            folder.remove()
    if trace is not None:
        timer.write_trace(trace)
    return VideoReport(
        source=str(source),
        target=str(target),
        frames=plan.frame_count,
        frames_with_faces=_count_changed(plan, tracks),
        starts_at_s=round(float((int(plan.pts[0]) - first_pass.info.start_pts) * plan.time_base), 6),
        people=_describe(plan, tracks, identities),
        seconds=perf_counter() - start,
        stage_ms=timer.ms_per(plan.frame_count),
        damage=plan.damage,
    )


def _check_space(reader: VideoReader, target: Path, folder: WorkFolder | None) -> None:
    """Look ahead whether there is room for the output, and its segments, if it is as large as its source."""
    size = float(reader.info.path.stat().st_size)
    begin, end = reader.range_s
    if reader.info.duration_s and (begin is not None or end is not None):
        length = float((end or reader.info.duration_s) - (begin or 0))
        size *= min(1.0, length / reader.info.duration_s)
    sizes = {target.parent: size}
    if folder and folder.path.parent.samefile(target.parent):
        sizes[target.parent] += max(0.0, size - folder.size())
    elif folder:
        sizes[folder.path] = max(0.0, size - folder.size())
    check_space(sizes)


def _manifest(
    networks: Networks, reader: VideoReader, sha256: str, plan: Plan | None, wish: Mapping, writer: VideoWriter
) -> dict:
    """Return all that the segments of a run depend on, of JSON types."""
    return {
        "input": sha256,
        "range": [reader.start_s, reader.end_s],
        "plan": plan and fingerprint(plan),
        "options": _plain(wish),
        "output": _plain({"container": writer.path.suffix.lower(), "encoder": writer.encoder}),
        "networks": dict(networks.fingerprints),
        "versions": versions(),
    }


def _plain(value: object) -> object:
    """Return a value of dataclasses and mappings as JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(each) for key, each in vars(value).items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return value


def _check_plan(plan: Plan, networks: Networks, reader: VideoReader, sha256: str) -> None:
    """Raise MediaError if a plan is of another video, another range, or of other networks."""
    if plan.sha256 != sha256:
        raise MediaError(f"the plan is not of {reader.info.path} as it is now; scan it again")
    if (plan.start_s, plan.end_s) != (reader.start_s, reader.end_s):
        raise MediaError(
            f"the plan is of the range {plan.start_s} to {plan.end_s} s, {reader.start_s} to {reader.end_s} s is asked "
            "for; give the same range, or scan it again"
        )
    if dict(plan.estimators) != networks.estimators:
        raise MediaError(
            f"the plan was made with other networks for age and identity than model {networks.model} has; "
            "scan the video again with --model"
        )


@dataclass(frozen=True, kw_only=True)
class _Stretches:
    """What the stretches of one video have in common: all that a worker must know to render any of them."""

    source: Path
    start_s: float | None
    end_s: float | None
    folder: Path
    """The work folder: it holds the plan and gets the segments."""
    request: AgeRequest | None
    people: People
    form: SegmentFormat
    traces: bool


class _Rendered(NamedTuple):
    """What came of a stretch since the last one of these."""

    frames: int
    seconds: Mapping[str, float]
    """By stage."""
    spans: Sequence[Span] = ()
    """For a trace."""


def _render_stretch(job: _Stretches, worker: Worker, stretch: tuple[int, int]) -> Iterator[_Rendered]:
    """Render the segments from the first to before the last number of a stretch into the work folder."""
    if not job.folder.exists():
        raise MediaError(
            f"{platform.node()} does not see {job.folder}; every machine must see the input and the work folder under "
            "the same names: name a shared folder with --work"
        )
    plan = load_plan(job.folder)
    low, high = (int(plan.boundaries[number]) for number in stretch)
    timer = StageTimer(worker.networks.device, traces=job.traces)
    tracks = decide(worker.networks, plan, job.request, job.people, first=low, last=high)
    renderer = Renderer(worker.networks, plan, tracks, timer)
    out = _SegmentSink(job, plan, renderer, stretch[0], worker.networks.device)
    try:
        with (
            computing(worker.networks.device),
            VideoReader(
                job.source,
                start_s=job.start_s,
                end_s=job.end_s,
                threads=worker.threads,
                device=worker.networks.device,
            ) as reader,
        ):
            for done in _render(plan, reader, renderer, low, high, out.write):
                if done % KEY_EVERY_FRAMES == 0:
                    yield _Rendered(KEY_EVERY_FRAMES, {})
            yield _Rendered((high - low) % KEY_EVERY_FRAMES, *timer.measured())
    except OSError as error:
        raise full(job.folder, error) from error
    finally:
        out.close()


class _SegmentSink:
    """Takes the frames of consecutive segments in order, and leaves each segment in the work folder."""

    def __init__(self, job: _Stretches, plan: Plan, renderer: Renderer, first: int, device: str | None) -> None:
        self._job, self._plan, self._renderer, self._index, self._device = job, plan, renderer, first, device
        self._encoder: SegmentEncoder | None = None
        self._out: SegmentWriter | None = None

    def write(self, frame: Frame) -> None:
        """Encode one frame."""
        low, high = (int(edge) for edge in self._plan.boundaries[self._index : self._index + 2])
        if self._encoder is None or self._out is None:
            self._encoder = SegmentEncoder(self._job.form, device=self._device)
            self._out = SegmentWriter(segment_path(self._job.folder, self._index))
        self._out.write(self._encoder.encode(frame))
        if len(self._encoder.ticks) < high - low:
            return
        self._out.write(self._encoder.finish())
        identities = self._renderer.identities
        mine = {track: value for track, value in identities.items() if low <= self._renderer.first_key(track) < high}
        notes = {"tracks": np.array([*mine], np.int64), "identities": np.array([*mine.values()], np.float64)}
        self._out.finish(self._encoder.ticks, notes)
        self._index, self._encoder, self._out = self._index + 1, None, None

    def close(self) -> None:
        """Give up the segment that is not complete."""
        if self._out is not None:
            self._out.close()


def _render(
    plan: Plan, reader: VideoReader, renderer: Renderer, low: int, high: int, write: Callable[[Frame], None]
) -> Iterator[int]:
    """Render the frames from boundary `low` to before `high` in three threads, with bounded queues between them.

    Args:
        plan: of the video.
        reader: of the same range.
        renderer: changes the frames, and times itself.
        low: frame.
        high: frame.
        write: takes each frame, in a thread.

    Yields:
        How many frames were handed over so far.
    """
    timer = renderer.timer
    needed = read_planned(plan, reader, renderer.begin(low), min(high + 1, plan.frame_count))
    frames = read_ahead(timed(needed, "decode", timer), QUEUED_FRAMES)

    def encode(frame: Frame) -> None:
        with timer("encode"):
            write(frame)

    with WriteBehind(encode, QUEUED_FRAMES) as out:
        for done, frame in enumerate(renderer.render(frames, low, high), 1):
            out.put(frame)
            del frame
            yield done


@dataclass
class _Job:
    """The second pass over one video."""

    networks: Networks
    plan: Plan
    tracks: list[AgedTrack]
    reader: VideoReader
    writer: VideoWriter
    timer: StageTimer
    progress: Progress

    def render_whole(self) -> dict[int, float]:
        """Render all segments here, straight into the output; return the identity of each changed track, by its id."""
        cuts = {int(edge) for edge in self.plan.boundaries[1:-1]}

        def write(frame: Frame) -> None:
            if self.writer.frames_written in cuts:
                self.writer.cut()
            self.writer.write(frame)

        renderer = Renderer(self.networks, self.plan, self.tracks, self.timer)
        for done in _render(self.plan, self.reader, renderer, 0, self.plan.frame_count, write):
            self.progress("render", done, self.plan.frame_count)
        return renderer.identities

    def render_segments(
        self, folder: Path, workers: Workers, request: AgeRequest | None, people: People
    ) -> dict[int, float]:
        """Let workers render the segments that are not there yet, and put all together; return as `render_whole`."""
        count, boundaries = self.plan.segment_count, self.plan.boundaries
        self.writer.begin(int(self.plan.pts[0]))
        missing = [number for number in range(count) if open_segment(segment_path(folder, number)) is None]
        # One worker has more of long stretches: it decodes on from segment to segment.
        stretches = _runs(missing) if workers.count == 1 else [(number, number + 1) for number in missing]
        done = self.plan.frame_count - sum(int(boundaries[number + 1] - boundaries[number]) for number in missing)
        job = _Stretches(
            source=self.reader.info.path.absolute(),
            start_s=self.reader.start_s,
            end_s=self.reader.end_s,
            folder=folder.absolute(),
            request=request,
            people=people,
            form=self.writer.segment_format(),
            traces=self.timer.traces,
        )
        with closing(workers.map(partial(_render_stretch, job), stretches)) as rendered:
            for part in rendered:
                done += part.frames
                self.timer.add(part.seconds, part.spans)
                self.progress("render", done, self.plan.frame_count)
        identities: dict[int, float] = {}
        for number in range(count):
            segment = open_segment(segment_path(folder, number))
            if segment is None:
                raise MediaError(f"{segment_path(folder, number)} has vanished; run the same command again")
            identities |= zip(segment.notes["tracks"].tolist(), segment.notes["identities"].tolist(), strict=True)
            self.writer.add(segment)
        return identities


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Return the runs [first, last) of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def read_planned(plan: Plan, reader: VideoReader, first: int, last: int) -> Iterator[Frame]:
    """Yield the frames from `first` to before `last` of the video that a plan is of.

    Raises:
        MediaError: if they are others than the plan says.
    """
    if first == 0:
        frames = reader.read()
    elif plan.can_seek:
        frames = reader.read(int(plan.pts[first]))
    else:
        frames = islice(reader.read(), first, None)
    for index in range(first, last):
        frame = next(frames, None)
        if frame is None or frame.pts != plan.pts[index]:
            found = "the end" if frame is None else f"time stamp {frame.pts}"
            raise MediaError(
                f"{reader.info.path}: frame {index} is to have time stamp {plan.pts[index]}, {found} was found; "
                "has the file changed? scan it again"
            )
        yield frame
        del frame


def _count_changed(plan: Plan, tracks: list[AgedTrack]) -> int:
    """Return in how many frames somebody is changed."""
    changed = np.zeros(plan.frame_count, bool)
    for aged in tracks:
        changed[aged.track.first_frame : aged.track.last_frame + 1] |= aged.weights > 0
    return int(changed.sum())


def _describe(plan: Plan, tracks: list[AgedTrack], identities: dict[int, float]) -> tuple[PersonReport, ...]:
    """Return what was done to each person, in order of their numbers."""
    aged: dict[int, list[AgedTrack]] = {}
    for track in tracks:
        aged.setdefault(track.person, []).append(track)
    reports = []
    for number, planned in plan.people().items():
        mine = aged.get(number, [])
        targets = np.concatenate([track.target_ages for track in mine]) if mine else np.zeros(0)
        best_frame, best_box = _best_face(planned)
        measured = [identities[p.track.track_id] for p in planned if p.track.track_id in identities]
        reports.append(
            PersonReport(
                person=number,
                first_frame=min(p.track.first_frame for p in planned),
                last_frame=max(p.track.last_frame for p in planned),
                shots=tuple(sorted({p.track.shot for p in planned})),
                source_age=round(mine[0].source_age if mine else person_age(planned), 1),
                target_age=round(float(targets[-1]), 1) if mine else None,
                target_age_first=round(float(targets[0]), 1) if mine and np.ptp(targets) else None,
                identity=round(sum(measured) / len(measured), 3) if measured else None,
                best_time_s=round(plan.time_s(best_frame), 6),
                best_box=best_box,
            )
        )
    return tuple(reports)


def _best_face(tracks: list[PlannedTrack]) -> tuple[int, tuple[float, float, float, float]]:
    """Return the frame in which a person is seen best, on the longest track, and the box of the face there."""
    track = max((planned.track for planned in tracks), key=len)
    at = int(np.argmax(face_quality(track.landmarks, track.scores)))
    points = track.landmarks[at]
    (x, y), spread = points.mean(0), float(np.ptp(points, 0).max())
    sides = (x - FACE_BOX[0] * spread, y - FACE_BOX[1] * spread, x + FACE_BOX[0] * spread, y + FACE_BOX[1] * spread)
    left, top, right, bottom = (round(float(side), 1) for side in sides)
    return track.first_frame + at, (left, top, right, bottom)
