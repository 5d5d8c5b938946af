"""A page to look at what a run did: each face before and after, with a slider. One file that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from faceage.errors import FaceAgeError
from faceage.kernels import gather_crops, to_host
from faceage.media.image import read_image
from faceage.media.video import VideoReader
from faceage.types import Frame

PICTURE_PX = 224
CONTEXT = 1.9
"""Side of a picture in sides of the face's box."""
FILES_SHOWN = 200
"""Files whose faces are shown; of others what failed is listed."""
FACES_SHOWN = 12
"""Faces of one file that are shown."""
FAILURES_SHOWN = 1000
JUST_BEFORE_S = 0.002
"""A frame is looked for from so long before its time on: containers round times to a millisecond."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; }
section { border-top: 1px solid #ccc; padding: 1em 0; }
h2 { font-size: 1em; margin: 0 0 .5em; overflow-wrap: anywhere; }
figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top; }
.pair { position: relative; width: 224px; height: 224px; --cut: 50%; }
.pair img { position: absolute; inset: 0; border-radius: 6px; }
.pair img + img { clip-path: inset(0 0 0 var(--cut)); }
.pair input { position: absolute; inset: auto 0 4px; width: 100%; margin: 0; }
.bad { color: #b00; }
td { padding-right: 1.5em; }
"""


def report_page(record: Mapping[str, Any], items: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the parts of the page, HTML.

    Args:
        record: of `--report`, without its items.
        items: of `--report`; taken one by one.
    """
    title = f"faceage {record['command']}: {record['done']} done, {record['failed']} failed"
    yield (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style>\n<h1>{escape(title)}</h1>\n{_facts(record)}\n"
    )
    shown = left_out = failures = 0
    for item in items:
        if item.get("error"):
            failures += 1
            if failures <= FAILURES_SHOWN:
                yield f'<section><p class="bad">{escape(item["error"])}</p></section>\n'
        elif shown < FILES_SHOWN:
            shown += 1
            yield _section(item)
        else:
            left_out += 1
    if left_out:
        yield f"<p>{left_out} more files are done and not shown here.</p>\n"
    if failures > FAILURES_SHOWN:
        yield f'<p class="bad">{failures - FAILURES_SHOWN} more files failed; the report in JSON has all.</p>\n'
    yield "</html>\n"


def _facts(record: Mapping[str, Any]) -> str:
    machine, versions = record["machine"], record["versions"]
    rows = [
        ("time", f"{record['seconds']:.1f} s"),
        ("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    if "engines" in record:
        rows.insert(1, ("model", ", ".join(str(value) for value in record["engines"].values())))
    if "photos_per_second" in record:
        rows.insert(1, ("speed", f"{record['photos_per_second']} photos a second"))
    if "stage_ms" in record:
        rows.append(("ms a photo", _stages(record["stage_ms"])))
    cells = "".join(f"<tr><td>{name}<td>{escape(str(value))}" for name, value in rows)
    warnings = "".join(f'<p class="bad">{escape(text)}</p>' for text in record.get("warnings", []))
    return f"<table>{cells}</table>{warnings}"


def _stages(milliseconds: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {value:g}" for stage, value in milliseconds.items()) + " (overlapping)"


def _section(item: Mapping[str, Any]) -> str:
    """Return what is shown of one file that is done."""
    head = f"<h2>{escape(item['source'])} &rarr; {escape(item.get('target', ''))}</h2>"
    if "people" in item and "stage_ms" in item:
        fps = item["frames"] / max(item["seconds"], 1e-3)
        head += f"<p>{item['frames']} frames, {fps:.1f} fps; ms a frame: {escape(_stages(item['stage_ms']))}</p>"
        faces, pictures = item["people"], _video_pictures(item)
    elif "faces" in item:
        faces, pictures = item["faces"], _photo_pictures(item)
    else:
        return f"<section>{head}</section>\n"
    if item.get("damage"):
        head += f'<p class="bad">{escape(item["damage"])}</p>'
    figures = [_figure(face, pair) for face, pair in zip(faces, pictures, strict=False)]
    more = f"<p>and {len(faces) - FACES_SHOWN} more</p>" if len(faces) > FACES_SHOWN else ""
    return f"<section>{head}{''.join(figures) or '<p>no face</p>'}{more}</section>\n"


def _figure(face: Mapping[str, Any], pictures: tuple[str, str] | None) -> str:
    if pictures is None:
        shown = "<p>no picture: a file has changed since</p>"
    else:
        images = "".join(
            f'<img src="{uri}" width="{PICTURE_PX}" height="{PICTURE_PX}" alt="{name}">'
            for name, uri in zip(("before", "after"), pictures, strict=True)
        )
        slide = "this.parentNode.style.setProperty('--cut', this.value + '%')"
        slider = f'<input type="range" value="50" aria-label="before and after" oninput="{slide}">'
        shown = f'<div class="pair">{images}{slider}</div>'
    name = f"person {face['person']}: " if "person" in face else ""
    if face["target_age"] is None:
        ages = f"{face['source_age']:.0f}, kept"
    else:
        first = face.get("target_age_first")
        moving = "" if first is None else f"{first:.0f} &rarr; "
        ages = f"{face['source_age']:.0f} &rarr; {moving}{face['target_age']:.0f}"
    identity = "" if face["identity"] is None else f", identity {face['identity']:.2f}"
    weight = f", weight {face['weight']:g}" if "weight" in face else ""
    return f"<figure>{shown}<figcaption>{name}{ages}{identity}{weight}</figcaption></figure>"


def _photo_pictures(item: Mapping[str, Any]) -> list[tuple[str, str] | None]:
    """Return a photo's faces before and after; None where a file has changed since."""
    boxes = [face["box"] for face in item["faces"][:FACES_SHOWN]]
    try:
        frames = [read_image(item[name]).frame for name in ("source", "target")] if boxes else []
    except FaceAgeError:
        return [None] * len(boxes)
    return [(_picture(frames[0], box), _picture(frames[1], box)) for box in boxes]


def _video_pictures(item: Mapping[str, Any]) -> list[tuple[str, str] | None]:
    """Return the people of a video before and after, each at their best frame."""
    pictures: list[tuple[str, str] | None] = []
    for person in item["people"][:FACES_SHOWN]:
        try:
            before = _frame_at(Path(item["source"]), item["starts_at_s"] + person["best_time_s"])
            after = _frame_at(Path(item["target"]), person["best_time_s"])
        except FaceAgeError:
            pictures.append(None)
            continue
        pictures.append((_picture(before, person["best_box"]), _picture(after, person["best_box"])))
    return pictures


def _frame_at(path: Path, time_s: float) -> Frame:
    """Return the frame at a time, in seconds from the first one."""
    start = time_s - JUST_BEFORE_S
    with VideoReader(path, start_s=start if start > 0 else None) as reader:
        return next(iter(reader))


def _picture(frame: Frame, box: tuple[float, float, float, float]) -> str:
    """Return a face and some of what is around it as a data URI."""
    left, top, right, bottom = box
    scale = PICTURE_PX / (CONTEXT * max(right - left, bottom - top, 1.0))
    x, y = (left + right) / 2, (top + bottom) / 2
    centre = (PICTURE_PX - 1) / 2
    matrix = np.array([[[scale, 0, centre - scale * x], [0, scale, centre - scale * y]]], np.float32)
    (crop,) = to_host(gather_crops([frame], np.zeros(1, np.int64), matrix, PICTURE_PX))
    pixels = np.rint((crop[::-1].transpose(1, 2, 0) + 1) * 127.5).clip(0, 255).astype(np.uint8)
    _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 88])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
