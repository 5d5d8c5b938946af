"""A page of the people of a video: who is who by which number. One file that needs no other and no network."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from html import escape

import cv2
import numpy as np

from faceage.align import face_quality, prepare_crops
from faceage.geometry import TEMPLATE_5
from faceage.media.video import VideoReader
from faceage.pipeline.plan import Plan, PlannedTrack, person_age
from faceage.pipeline.video import read_planned
from faceage.track import Track
from faceage.types import FloatArray, Frame, View

THUMBNAILS = 3
"""Pictures of each person at most, each of another track if there are as many."""
THUMBNAIL_PX = 128
SPANS_SHOWN = 12
"""Times on screen of each person that are listed."""
_VIEW = View("thumbnail", 0.2 + 0.6 * TEMPLATE_5, (THUMBNAIL_PX,))

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; }
section { display: flex; gap: 1em; align-items: center; border-top: 1px solid #ccc; padding: 1em 0; }
h2 { min-width: 3em; margin: 0; }
img { border-radius: 6px; margin-right: 4px; }
code { background: #eee; color: #222; padding: 0 .3em; }
"""


def people_page(plan: Plan, reader: VideoReader, name: str) -> str:
    """Return the page as HTML.

    Args:
        plan: of the video.
        reader: of the same range, of which nothing was read.
        name: of the video, as a command line would have it.

    Raises:
        MediaError: if the video is not the plan's.
    """
    people = plan.people()
    wanted = {number: _best_places(tracks) for number, tracks in people.items()}
    frames = sorted({frame for places in wanted.values() for _, frame in places})
    pictures: dict[tuple[int, int], str] = {}
    for index, frame in _frames_at(plan, reader, frames):
        for places in wanted.values():
            for track, place in places:
                if place == index:
                    pictures[track.track_id, place] = _picture(frame, track.landmarks[place - track.first_frame])
    sections = [
        _section(plan, number, tracks, [pictures[track.track_id, frame] for track, frame in wanted[number]])
        for number, tracks in people.items()
    ]
    count = f"{len(people)} {'person' if len(people) == 1 else 'people'}"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(name)}: {count}</title>'
        f"<style>{_STYLE}</style>\n<h1>{escape(name)}</h1>\n"
        f"<p>{count}, {plan.frame_count} frames, {plan.time_s(plan.frame_count - 1):.1f} s. To age them one by one: "
        f"<code>faceage video {escape(name)} -o OUT --plan DIR --person 1=70 --person 2=+20</code></p>\n"
        + "\n".join(sections)
        + "\n</html>\n"
    )


def _best_places(tracks: list[PlannedTrack]) -> list[tuple[Track, int]]:
    """Return the track and the frame of a person's thumbnails: the best frame of the longest tracks."""
    longest = sorted((planned.track for planned in tracks), key=len, reverse=True)[:THUMBNAILS]
    places = []
    for track in longest:
        places.append((track, track.first_frame + int(np.argmax(face_quality(track.landmarks, track.scores)))))
    return places


def _frames_at(plan: Plan, reader: VideoReader, wanted: list[int]) -> Iterator[tuple[int, Frame]]:
    """Yield frames by their numbers."""
    if plan.can_seek:
        for index in wanted:
            for frame in read_planned(plan, reader, index, index + 1):
                yield index, frame
        return
    for index, frame in enumerate(read_planned(plan, reader, 0, max(wanted, default=-1) + 1)):
        if index in wanted:
            yield index, frame


def _picture(frame: Frame, landmarks: FloatArray) -> str:
    """Return a face as a data URI."""
    crop = prepare_crops([frame], np.zeros(1, np.int64), landmarks[None], _VIEW, THUMBNAIL_PX).pixels[0]
    pixels = np.rint((crop[::-1].transpose(1, 2, 0) + 1) * 127.5).clip(0, 255).astype(np.uint8)
    _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def _section(plan: Plan, number: int, tracks: list[PlannedTrack], pictures: list[str]) -> str:
    images = "".join(f'<img src="{uri}" width="{THUMBNAIL_PX}" height="{THUMBNAIL_PX}" alt="">' for uri in pictures)
    spans = [(plan.time_s(p.track.first_frame), plan.time_s(p.track.last_frame)) for p in tracks]
    shown = ", ".join(f"{_clock(first)}-{_clock(last)}" for first, last in spans[:SPANS_SHOWN])
    more = f" and {len(spans) - SPANS_SHOWN} more" if len(spans) > SPANS_SHOWN else ""
    return (
        f"<section><h2>{number}</h2><div>{images}</div><div>looks {person_age(tracks):.0f}<br>{shown}{more}</div>"
        "</section>"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:04.1f}"
