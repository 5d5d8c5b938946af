"""Age the faces of a video: scan it, render it, and write it like the source was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from itertools import islice
from pathlib import Path
from time import perf_counter

import numpy as np

from faceage.checkpoint import sha256_of
from faceage.errors import MediaError
from faceage.media.segment import SegmentEncoder, SegmentWriter, open_segment
from faceage.media.video import EncodeOptions, VideoReader, VideoWriter, check_output
from faceage.pipeline.label import describe_people, label_comment, label_fields
from faceage.pipeline.plan import Plan, fingerprint, person_age
from faceage.pipeline.render import AgedTrack, People, Renderer, decide
from faceage.pipeline.report import PersonReport, VideoReport
from faceage.pipeline.request import AgeRequest, Networks, StageTimer
from faceage.pipeline.scan import Progress, scan
from faceage.pipeline.threads import WriteBehind, read_ahead, timed
from faceage.pipeline.work import WorkFolder, full, locked, versions, work_folder
from faceage.track import TrackConfig
from faceage.types import Frame

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
    label: bool = True,
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
        label: mark the output as partly synthetic, in its comment; a copy of the source is not marked.
        progress: called now and then, from this thread.

    Raises:
        MediaError: if the source is no video, the plan is another one's, another run writes the output, or it cannot be
            written.
        UnsupportedError: for a pixel format or container that cannot be used.
    """
    start = perf_counter()
    timer = StageTimer()
    source, target = Path(source), Path(target)
    encode = encode or EncodeOptions()
    if label:
        fields = label_fields(networks, describe_people(request, people or {}))
        encode = replace(encode, metadata={**encode.metadata, "comment": label_comment(source, fields)})
    wish = {"everybody": request, "people": people or {}, "track": track or TrackConfig()}
    with (
        VideoReader(source, start_s=start_s, end_s=end_s) as first_pass,
        VideoReader(source, start_s=start_s, end_s=end_s) as second_pass,
        locked(check_output(target, [source], overwrite=encode.overwrite)),
    ):
        # The writer is opened before the long scan, so that an output that cannot be written is known at once.
        with VideoWriter(target, second_pass, encode) as writer:
            sha256 = sha256_of(source)
            if plan is not None:
                _check_plan(plan, networks, first_pass, sha256)
            folder: WorkFolder | None = None
            if resume:
                manifest = _manifest(networks, first_pass, sha256, plan, wish, writer)
                folder = WorkFolder(work_folder(target, work), manifest)
                plan = plan or folder.plan()
            if plan is None:
                try:
                    plan = scan(networks, first_pass, track, sha256=sha256, timer=timer, progress=progress)
                except BaseException:
                    if folder:
                        folder.remove()  # there is nothing to go on with
                    raise
            if folder:
                folder.save(plan)
            tracks = decide(networks, plan, request, people)
            job = _Job(networks, plan, tracks, second_pass, writer, timer, progress or (lambda *_: None))
            identities = job.run(folder)
        if folder:
            folder.remove()
    return VideoReport(
        source=str(source),
        target=str(target),
        frames=plan.frame_count,
        frames_with_faces=_count_changed(plan, tracks),
        people=_describe(plan, tracks, identities),
        seconds=perf_counter() - start,
        stage_ms=timer.ms_per(plan.frame_count),
        damage=plan.damage,
    )


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


@dataclass
class _Job:
    """The second pass over one video: decode, change and encode in three threads, bounded queues between them."""

    networks: Networks
    plan: Plan
    tracks: list[AgedTrack]
    reader: VideoReader
    writer: VideoWriter
    timer: StageTimer
    progress: Progress

    def run(self, folder: WorkFolder | None) -> dict[int, float]:
        """Make the output; return the identity of each track that is changed, by its id."""
        if not any(aged.weights.any() for aged in self.tracks) and self.writer.can_copy_source:
            self.writer.copy_source()
            return {}
        if folder and self.plan.segment_count > 1:
            return self.render_segments(folder)
        return self.render_whole()

    def render_whole(self) -> dict[int, float]:
        """Render all segments straight into the output; return as `run`."""
        cuts = {int(edge) for edge in self.plan.boundaries[1:-1]}

        def write(frame: Frame) -> None:
            if self.writer.frames_written in cuts:
                self.writer.cut()
            self.writer.write(frame)

        return self._render(0, self.plan.segment_count, write)

    def render_segments(self, folder: WorkFolder) -> dict[int, float]:
        """Render the segments that are not there yet, and put all together; return as `run`."""
        count = self.plan.segment_count
        self.writer.begin(int(self.plan.pts[0]))
        missing = [index for index in range(count) if open_segment(folder.segment(index)) is None]
        for first, last in _runs(missing):
            self._render_run(folder, first, last)
        identities: dict[int, float] = {}
        for index in range(count):
            segment = open_segment(folder.segment(index))
            if segment is None:
                raise MediaError(f"{folder.segment(index)} has vanished; run the same command again")
            identities |= zip(segment.notes["tracks"].tolist(), segment.notes["identities"].tolist(), strict=True)
            self.writer.add(segment)
        return identities

    def _render_run(self, folder: WorkFolder, first: int, last: int) -> None:
        """Render the segments from `first` to before `last` into the work folder."""
        index, left = first, 0
        encoder: SegmentEncoder | None = None
        out: SegmentWriter | None = None
        renderer = Renderer(self.networks, self.plan, self.tracks, self.timer)

        def write(frame: Frame) -> None:
            nonlocal index, left, encoder, out
            if encoder is None or out is None:
                encoder, out = self.writer.new_segment(), SegmentWriter(folder.segment(index))
                left = int(self.plan.boundaries[index + 1] - self.plan.boundaries[index])
            out.write(encoder.encode(frame))
            left -= 1
            if not left:
                out.write(encoder.finish())
                low, high = (int(edge) for edge in self.plan.boundaries[index : index + 2])
                mine = {t: v for t, v in renderer.identities.items() if low <= renderer.first_key(t) < high}
                notes = {"tracks": np.array([*mine], np.int64), "identities": np.array([*mine.values()], np.float64)}
                out.finish(encoder.ticks, notes)
                index, encoder, out = index + 1, None, None

        try:
            self._render(first, last, write, renderer)
        except OSError as error:
            raise full(folder.path, error) from error
        finally:
            if out is not None:
                out.close()

    def _render(
        self, first: int, last: int, write: Callable[[Frame], None], renderer: Renderer | None = None
    ) -> dict[int, float]:
        """Render the frames of the segments from `first` to before `last`, and hand them to `write` in a thread."""
        low, high = int(self.plan.boundaries[first]), int(self.plan.boundaries[last])
        renderer = renderer or Renderer(self.networks, self.plan, self.tracks, self.timer)
        needed = read_planned(self.plan, self.reader, renderer.begin(low), min(high + 1, self.plan.frame_count))
        frames = read_ahead(timed(needed, "decode", self.timer), QUEUED_FRAMES)

        def encode(frame: Frame) -> None:
            with self.timer("encode"):
                write(frame)

        with WriteBehind(encode, QUEUED_FRAMES) as out:
            for done, frame in enumerate(renderer.render(frames, low, high), low + 1):
                out.put(frame)
                del frame
                self.progress("render", done, self.plan.frame_count)
        return renderer.identities


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
    aged = {track.person: track for track in tracks}
    reports = []
    for number, planned in plan.people().items():
        mine = aged.get(number)
        measured = [identities[p.track.track_id] for p in planned if p.track.track_id in identities]
        reports.append(
            PersonReport(
                person=number,
                first_frame=min(p.track.first_frame for p in planned),
                last_frame=max(p.track.last_frame for p in planned),
                shots=tuple(sorted({p.track.shot for p in planned})),
                source_age=round(mine.source_age if mine else person_age(planned), 1),
                target_age=round(mine.target_age, 1) if mine else None,
                identity=round(sum(measured) / len(measured), 3) if measured else None,
            )
        )
    return tuple(reports)
