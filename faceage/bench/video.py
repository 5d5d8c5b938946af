"""Speed and memory of ageing a video, against decoding and encoding it alone."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import av

from faceage.bench.device import decode_alone, eager, encode_alone, whole_frames
from faceage.bench.runs import Load, Notify, in_child, medians
from faceage.errors import MediaError, UnsupportedError
from faceage.media.probe import open_input, video_stream
from faceage.media.video import EncodeOptions, VideoReader, transcode
from faceage.pipeline.plan import load_plan, save_plan
from faceage.pipeline.request import AgeRequest
from faceage.pipeline.scan import scan
from faceage.pipeline.video import age_video

ON_DEVICE = ("decode", "encode", "eager", "whole_frames")
"""What else is measured on a GPU."""


def bench_video(
    load: Load,
    clip: Path,
    request: AgeRequest,
    encode: EncodeOptions,
    *,
    repeats: int = 2,
    against: str | None = None,
    loops: int | None = None,
    device: str | None = None,
    from_plan: bool = False,
    notify: Notify,
) -> dict:
    """Measure `age_video` against a bare transcode of the same clip with the same encoder settings.

    On a GPU also against its decoder alone, its encoder alone, and two other ways to the same end; see `bench.device`.

    Args:
        load: its engines are built already.
        clip: the video.
        request: whom to age.
        encode: for both.
        repeats: runs of each side.
        against: a command with {in} and {out}, timed as a whole process, start included, like ours is then.
        loops: also age the clip this many times in a row, to compare the peaks of memory.
        device: where the frames lie: a GPU; None: on the host.
        from_plan: scan the clip once before, and measure runs that need not.
        notify: told what runs.
    """
    runs: dict[str, list[dict]] = {"transcode": [], "faceage": [], "against": [], **{name: [] for name in ON_DEVICE}}
    with tempfile.TemporaryDirectory(prefix="faceage-bench-") as folder:
        target = Path(folder) / f"out{clip.suffix}"
        encode = replace(encode, overwrite=True)
        plan = Path(folder) / "plan" if from_plan else None
        if plan:
            notify("scanning the clip")
            in_child(scan_into, load, clip, plan)
        for number in range(1, repeats + 1):
            notify(f"bare transcode, {number} of {repeats}")
            runs["transcode"].append(in_child(_transcode, clip, target, encode, device))
            notify(f"faceage, {number} of {repeats}")
            runs["faceage"].append(in_child(_age, load, clip, target, request, encode, plan))
            if device is not None:
                for name, (function, *arguments) in _on_device(load, clip, target, request, encode, device).items():
                    notify(f"{name.replace('_', ' ')}, {number} of {repeats}")
                    runs[name].append(in_child(function, *arguments))
            if against:
                notify(f"{against}, {number} of {repeats}")
                runs["against"].append(_command(against, clip, target.with_stem("against")))
        result = _compare(runs)
        if loops:
            notify(f"faceage on {loops} times the clip")
            longer = loop_clip(clip, target.with_stem("longer"), loops)
            looped = in_child(_age, load, longer, target, request, encode)
            peak = result["faceage"]["peak_rss_mb"]
            looped["peak_rss_ratio"] = round(looped["peak_rss_mb"] / peak, 3)
            result["looped"] = {"loops": loops, **looped}
    return result


def _on_device(
    load: Load, clip: Path, target: Path, request: AgeRequest, encode: EncodeOptions, device: str
) -> dict[str, tuple]:
    """Return what else is run on a GPU: a function and its arguments, by name."""
    baselines = (
        (decode_alone, clip, device),
        (encode_alone, clip, target, encode, device),
        (eager, load, clip, target, request, encode),
        (whole_frames, load, clip, target, encode, device),
    )
    return dict(zip(ON_DEVICE, baselines, strict=True))


def _compare(runs: dict[str, list[dict]]) -> dict:
    result: dict = {name: medians(rows) for name, rows in runs.items() if rows}
    if "decode" in result:
        fps = {name: result[name]["fps"] for name in ("faceage", *ON_DEVICE)}
        limit = min(fps["decode"], fps["encode"])
        result["share_of_decode_and_encode"] = round(fps["faceage"] / limit, 3)
        result["factor_over_eager"] = round(fps["faceage"] / fps["eager"], 2)
        result["factor_over_whole_frames"] = round(fps["faceage"] / fps["whole_frames"], 2)
    result["ratio_to_transcode"] = round(result["faceage"]["fps"] / result["transcode"]["fps"], 3)
    if "against" in result:
        factor = result["against"]["process_seconds"] / result["faceage"]["process_seconds"]
        result["factor_over_against"] = round(factor, 2)
    result["runs"] = {name: rows for name, rows in runs.items() if rows}
    return result


def _transcode(clip: Path, target: Path, encode: EncodeOptions, device: str | None) -> dict:
    start = perf_counter()
    frames = transcode(clip, target, encode, device=device)
    seconds = perf_counter() - start
    return {"frames": frames, "seconds": seconds, "fps": frames / seconds}


def scan_into(load: Load, clip: Path, folder: Path) -> dict:
    """Scan a clip and save its plan in a folder."""
    networks = load()
    start = perf_counter()
    with VideoReader(clip, device=networks.device) as reader:
        plan = scan(networks, reader)
    seconds = perf_counter() - start
    save_plan(plan, folder)
    return {"seconds": seconds, "duration_s": plan.time_s(plan.frame_count - 1) + 1 / plan.frame_rate}


def _age(
    load: Load, clip: Path, target: Path, request: AgeRequest, encode: EncodeOptions, plan: Path | None = None
) -> dict:
    networks = load()
    report = age_video(networks, clip, target, request, plan=load_plan(plan) if plan else None, encode=encode)
    return {
        "frames": report.frames,
        "seconds": report.seconds,
        "fps": report.frames / report.seconds,
        "people": len(report.people),
        "stage_ms": report.stage_ms,
    }


def _command(command: str, clip: Path, target: Path) -> dict:
    """Run another program on the clip."""
    words = [word.replace("{in}", str(clip)).replace("{out}", str(target)) for word in shlex.split(command)]
    start = perf_counter()
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UnsupportedError(f"{words[0]} cannot be run ({error.strerror}); check --against") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnsupportedError(f"{words[0]} failed with exit code {done.returncode}: {last}; check --against")
    return {"process_seconds": perf_counter() - start}


def loop_clip(clip: Path, target: Path, loops: int) -> Path:
    """Write a clip several times in a row, packet for packet, picture only."""
    with open_input(clip) as source, av.open(str(target), "w") as output:
        stream = video_stream(source, clip)
        copy = output.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        times = [(packet.pts, packet.dts) for packet in packets if packet.pts is not None and packet.dts is not None]
        if not packets or len(times) < len(packets):
            raise MediaError(f"{clip} has packets without times, so it cannot be looped; use an MP4 clip")
        first, last = min(times), max(times)
        duration = packets[times.index(last)].duration or 1
        length = last[0] + duration - first[0]
        for start in range(0, loops * length, length):
            for packet, (pts, dts) in zip(packets, times, strict=True):
                again = av.Packet(bytes(packet))
                again.pts, again.dts = pts + start, dts + start
                again.duration, again.time_base = packet.duration, packet.time_base
                again.is_keyframe = packet.is_keyframe
                again.stream = copy
                output.mux(again)
    return target
