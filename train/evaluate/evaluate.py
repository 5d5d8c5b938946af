"""A scorecard that cannot flatter: what the product does to validation faces and clips, read by judges in no loss.

    python -m train.evaluate --data utkface.tar --teacher mobilefacenet_casia.ckpt \
        --judge runs/judge/judge.safetensors --media clips --out out/quality \
        --reader runs/reader64/age-estimator.safetensors --reader runs/reader32/age-estimator.safetensors

The bundled models are compared side by side, on the same faces, or those that `--model` names, one or more: a
checkpoint of one's own is made a model by `faceage models import`.
The judge of age shares neither pictures nor architecture with an estimator in a loss. The judge of identity is in no
loss either, but taught the identity network that is. Faces are drawn evenly over the age groups from pictures that
nothing was trained on, and aged at full resolution by the product's own path, which estimates their present age itself.
Beside the models stand rows whose answer is known: nothing done, a stranger's face, a blur, the difference of two mean
faces, real photos of the target age. If one of them does not score as it must, the card says that it is wrong, and the
command exits with 1. Writes `scorecard.json` (exact), `scorecard.md` and a `sheet-<model>.png` a model.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import click
import numpy as np
import torch

from faceage.agers.age_cgan import AgeCGAN
from faceage.agers.base import ModelFiles
from faceage.agers.latent import LatentConfig
from faceage.align import face_weights, prepare_crops
from faceage.checkpoint import sha256_of
from faceage.errors import NoFaceError
from faceage.media.video import EncodeOptions, VideoReader
from faceage.models import BUNDLED_MODELS, find_model
from faceage.pipeline.request import AgeRequest, Networks, load_networks
from faceage.pipeline.video import age_video
from faceage.track import Tracker
from faceage.types import RGB, FloatArray, Frame, IntArray
from train.age_cgan.latent import CHOICES, teacher_view
from train.data import FaceSet, load_faces
from train.evaluate import fgnet
from train.evaluate.composites import age_pictures
from train.evaluate.faces import (
    AGE_GROUPS,
    GENDERS,
    OLDEST_JUDGED_YEARS,
    RACES,
    Panel,
    draw_faces,
    make_requests,
    mask_in_picture,
    read_pictures,
    unlike_faces,
)
from train.evaluate.metrics import age_figures, match_thresholds
from train.evaluate.scorecard import headline, plain, render, write_sheet, wrong
from train.evaluate.sections import (
    SEED,
    Evaluation,
    add_baselines,
    age_section,
    fooled_section,
    identity_section,
    kid_section,
    mean,
    outside_section,
    sharpness_section,
    slices_section,
)
from train.evaluate.video import Followed, measure_tracks
from train.readers.judge import JUDGE_PX
from train.readers.teacher import load_teacher
from train.run import Script, git_commit

log = logging.getLogger(__name__)

FALSE_MATCH_RATES = {"0.1": 0.001, "1": 0.01}
"""By their names in per cent."""
CYCLE_FACES = 60
CYCLE_GAP_YEARS = 30
LATENT_BATCH = 32
VIDEO_BY_YEARS = 30.0
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi")
SHEET_FACES = 10
SHEET_AGES = tuple(range(20, 81, 10))


def cycle_section(e: Evaluation, networks: Networks) -> dict:
    """Age composites of a gap of 30 years back to the label, and compare them with the untouched pictures."""
    rows = np.flatnonzero(np.abs(e.requests.gaps) == CYCLE_GAP_YEARS)
    rows = np.sort(np.random.default_rng(SEED).permutation(rows)[:CYCLE_FACES])
    faces = e.requests.faces[rows]
    landmarks = e.drawn.landmarks[faces]
    back = age_pictures(networks, [e.pictures[networks.model][i] for i in rows], landmarks, e.drawn.ages[faces])
    errors = _changes(e, back.pictures, faces)
    figures = e.identity(e.panel.look(back.pictures, landmarks).embeddings, faces)
    return figures | {"mae_codes": mean(errors), "not_found_again": int(np.isnan(back.shares).sum())}


def no_years_section(e: Evaluation, networks: Networks) -> dict:
    """Age the drawn faces to the age that they are said to have: nothing should change."""
    made = age_pictures(networks, e.originals, e.drawn.landmarks, e.drawn.ages, is_present_age=True)
    changes = _changes(e, made.pictures, np.arange(len(made.pictures)))
    return {"n": len(changes), "mean_codes": mean(changes), "max_codes": float(changes.max(initial=0))}


def _changes(e: Evaluation, pictures: list[np.ndarray], faces: IntArray) -> FloatArray:
    """Return the mean absolute change of each picture against that of the drawn face [N] in its mask, in codes."""
    changes = []
    for picture, face in zip(pictures, faces, strict=True):
        before = e.originals[face]
        inside = mask_in_picture(before, e.drawn.landmarks[face]) > 0.5
        changes.append(np.abs(picture.astype(np.float32) - before)[inside].mean())
    return np.array(changes, np.float32)


def latent_section(e: Evaluation, networks: Networks) -> dict | None:
    """Return latent -> how far generated faces at the label's age are the same person; None for a model without.

    Reference: Antipov et al. 2017, arXiv:1702.01983, table 1.
    """
    if not isinstance(networks.ager, AgeCGAN):
        return None
    (view,), ages = networks.ager.views, e.drawn.ages
    (size,) = view.sizes_px
    frames = [Frame(planes=(picture,), pixel_format="rgb24", color=RGB) for picture in e.originals]
    everyone = np.arange(len(frames))
    crops = prepare_crops(frames, everyone, e.drawn.landmarks, view, size)

    def figures(faces: FloatArray) -> dict[str, float]:
        return e.identity(e.panel.embed(teacher_view(torch.from_numpy(faces))), everyone)

    section = {}
    for name, config in {"z0": replace(LatentConfig(), max_evaluations=1), **CHOICES}.items():
        ager = load_networks(model=networks.model, latent=config, composite="replace").ager
        parts = [slice(i, i + LATENT_BATCH) for i in range(0, len(crops), LATENT_BATCH)]
        # What "replace" adds to a crop to get the generated face, at the age that the face has already.
        deltas = []
        for part in parts:
            looks = ager.look([], ages[part], ages[part])
            deltas += [key.delta for key in ager.observe(looks, [crops[part]], [None] * len(looks))]
        section[name] = figures(crops.pixels + np.stack(deltas))
    return section | {f"(the {size}-px crop itself)": figures(crops.pixels)}


def video_section(networks: Networks, panel: Panel, clips: list[Path]) -> dict:
    """Age clips as `faceage video` does, but losslessly, and measure every track."""
    rows, left_out = [], 0
    for clip in clips:
        tracks = follow(networks, clip)
        with tempfile.TemporaryDirectory(prefix="faceage-evaluate-") as folder:
            target = Path(folder) / "aged.mkv"
            age_video(networks, clip, target, AgeRequest(by=VIDEO_BY_YEARS), encode=EncodeOptions(codec="ffv1"))
            figures = measure_tracks(_pairs(clip, target), tracks, panel.ages)
        rows += [{"clip": clip.name} | row for row in figures]
        left_out += len(tracks) - len(figures)
        log.info("%s, %s: %d tracks measured", networks.model, clip.name, len(figures))
    means = {
        name: mean(np.array([row[name] for row in rows]))
        for name in ("source_deviation", "aged_deviation", "warp_error")
    }
    return {"by": VIDEO_BY_YEARS, "tracks": rows, "left_out": left_out} | means


def follow(networks: Networks, clip: Path) -> list[Followed]:
    """Return the tracks that the product sees in a clip, with the landmarks as they were measured."""
    with VideoReader(clip) as reader:
        tracker = Tracker(networks.detector)
        measured: dict[tuple[int, int], FloatArray] = {}
        for window in tracker.scan(reader):
            faces = window.faces
            for track_id, frame, points in zip(window.track_ids, faces.frame_index, faces.landmarks, strict=True):
                measured[int(track_id), window.first_frame + int(frame)] = points
        rate = float(reader.info.average_rate or 25)
    nowhere = np.full((5, 2), np.nan, np.float32)
    return [
        Followed(
            track_id=track.track_id,
            first_frame=track.first_frame,
            smoothed=track.landmarks,
            measured=np.stack(
                [measured.get((track.track_id, track.first_frame + i), nowhere) for i in range(len(track))]
            ),
            weights=face_weights(
                track.landmarks, track.scores, fade_in=not track.starts_shot, fade_out=not track.ends_shot,
                frame_rate=rate,
            ),
        )
        for track in tracker.tracks()
    ]  # fmt: skip


def _pairs(source: Path, aged: Path) -> Iterator[tuple[Frame, Frame]]:
    """Yield the frames of two versions of a clip side by side."""
    with VideoReader(source) as before, VideoReader(aged) as after:
        yield from zip(before, after, strict=True)


def draw_sheet(networks: Networks, val: FaceSet, pictures: list[np.ndarray], path: Path) -> None:
    """Write ten unlike validation faces in rows: the original, then each of `SHEET_AGES`, at full resolution."""
    rows, labels = [], []
    for face in unlike_faces(val, SHEET_FACES, SEED):
        cells = [pictures[face]] * len(SHEET_AGES)
        points = np.repeat(val.landmarks[face][None], len(cells), 0)
        rows.append([pictures[face], *age_pictures(networks, cells, points, np.array(SHEET_AGES, np.float32)).pictures])
        labels.append(f"{GENDERS[val.genders[face]]}, {RACES[val.races[face]]}, {val.ages[face]:.0f}")
    write_sheet(path, rows, ("original", *map(str, SHEET_AGES)), labels)


def gather(archive: Path, cache: Path, panel: Panel, models: list[Networks], count: int) -> tuple[Evaluation, dict]:
    """Draw the faces, have the product age them with each model, and everything read.

    Returns:
        The evaluation, and the results of the sections that need all that was made.
    """
    faces = load_faces(archive, JUDGE_PX, cache)
    val = faces.rows(faces.validation & (faces.ages >= AGE_GROUPS[0][0]))
    pictures = read_pictures(archive, val.names)
    val_looks = panel.look(pictures, val.landmarks)
    limits, pairs = match_thresholds(val_looks.embeddings, list(FALSE_MATCH_RATES.values()))
    thresholds = dict(zip(FALSE_MATCH_RATES, limits, strict=True))
    judged = val.ages <= OLDEST_JUDGED_YEARS
    log.info("%d validation pictures read", len(val))

    own = draw_faces(val, count, SEED)
    drawn, originals = val.rows(own), [pictures[i] for i in own]
    asked = make_requests(drawn.ages)
    before = [originals[i] for i in asked.faces]
    points = drawn.landmarks[asked.faces]
    made = {networks.model: age_pictures(networks, before, points, asked.targets) for networks in models}
    shares = np.min([each.shares for each in made.values()], 0)  # NaN if any is
    rows = np.flatnonzero(shares > 0)
    requests = asked.rows(rows)
    if not requests.pooled.any():
        raise NoFaceError(f"the product changed none of {len(asked)} pictures by 20 or 30 years: nothing to measure")
    log.info("%d composites a model made, %d of them changed", len(asked), len(requests))

    e = Evaluation(panel, tuple(made), val, val_looks, own, drawn, originals, requests, thresholds, {}, {})
    for model, each in made.items():
        e.pictures[model] = [each.pictures[i] for i in rows]
    add_baselines(e, faces, pictures)
    scores, sets = kid_section(e, faces)
    counts = {
        "faces": len(own),
        "requests": len(asked),
        "not_found": int(np.isnan(shares).sum()),
        "left_alone": int((shares == 0).sum()),
        "measured": len(requests),
        "in_part": int((shares[rows] < 1).sum()),
        "source_mae": {m: _source_mae(each.source_ages, asked.faces, drawn.ages) for m, each in made.items()},
    }
    return e, {
        "counts": counts,
        "judge": age_figures(val.ages[judged], val_looks.ages[judged]),
        "thresholds": {"n": len(val), "pairs": pairs, **thresholds},
        "kid": scores,
        "kid_sets": sets,
        "outside": outside_section(e, {model: each.outside for model, each in made.items()}),
    }


def _source_mae(estimates: FloatArray, faces: IntArray, labels: FloatArray) -> float:
    """Return the mean absolute error of the product's own reading of the drawn faces' present ages, years."""
    found = ~np.isnan(estimates)
    return mean(np.abs(estimates - labels[faces])[found])


def evaluate(
    data: Path, cache: Path, panel: Panel, models: list[Networks], count: int, clips: list[Path], out: Path
) -> dict:
    """Measure everything; returns the results and writes the contact sheets."""
    start = perf_counter()
    e, results = gather(data, cache, panel, models, count)
    results |= {
        "age": age_section(e),
        "fooled": fooled_section(e) if panel.has_readers else None,
        "identity": identity_section(e),
        "sharpness": sharpness_section(e),
        "slices": {model: slices_section(e, model) for model in e.models},
    }
    sections: dict[str, Callable[[Networks], dict | None]] = {
        "cycle": lambda networks: cycle_section(e, networks),
        "no_years": lambda networks: no_years_section(e, networks),
        "latent": lambda networks: latent_section(e, networks),
        "video": lambda networks: video_section(networks, panel, clips) if clips else None,
    }
    for name, section in sections.items():
        results[name] = {networks.model: section(networks) for networks in models}
        log.info("%s: measured", name)
    for networks in models:
        draw_sheet(networks, e.drawn, e.originals, out / f"sheet-{networks.model}.png")
    seconds = perf_counter() - start
    results["settings"] = {
        "models": {model: _describe(find_model(model)) for model in e.models},
        "judges": panel.files,
        "commit": git_commit(),
        "seed": SEED,
        "seconds": seconds,
    }
    results["headline"] = headline(results)
    results["wrong"] = wrong(results)
    return results


def _describe(files: ModelFiles) -> dict:
    digests = {role: sha256_of(path)[:12] for role, path in files.paths.items()}
    return {"architecture": files.architecture, "files": digests}


@click.command(cls=Script, context_settings={"show_default": True})
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="UTKFace, a tar or a folder.")
@click.option("--teacher", type=click.Path(exists=True, path_type=Path), required=True, help="Judges identity.")
@click.option(
    "--judge", type=click.Path(exists=True, path_type=Path), required=True, help="Judges age; train.readers.judge."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the scorecard.")
@click.option("--model", "models", multiple=True, default=BUNDLED_MODELS, help="As `faceage models list` shows.")
@click.option("--faces", "count", type=click.IntRange(len(AGE_GROUPS)), default=300, help="Validation faces to age.")
@click.option(
    "--media", type=click.Path(exists=True, path_type=Path), multiple=True, help="A clip, or a folder of clips."
)
@click.option(
    "--reader", "readers", type=click.Path(exists=True, path_type=Path), multiple=True,
    help="An age estimator that was in a loss: how far is it fooled?",
)  # fmt: skip
@click.option(
    "--fgnet", "people", type=click.Path(exists=True, path_type=Path), help="FG-NET: compare with the person's photos."
)
@click.option("--cache", type=click.Path(path_type=Path), default=Path("runs/cache"), help="Aligned faces.")
def main(
    data: Path, teacher: Path, judge: Path, out: Path, models: tuple[str, ...], count: int, media: tuple[Path, ...],
    readers: tuple[Path, ...], people: Path | None, cache: Path,
) -> None:  # fmt: skip
    """Write the quality scorecard of one or more models, side by side."""
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8.0f ms  %(message)s")
    out.mkdir(parents=True, exist_ok=True)
    panel = Panel(judge, teacher, readers)
    loaded = [load_networks(model=model) for model in dict.fromkeys(models)]
    results = evaluate(data, cache, panel, loaded, count, find_clips(media), out)
    results["fgnet"] = fgnet.measure(people, loaded, load_teacher(teacher)) if people else None
    (out / "scorecard.json").write_text(json.dumps(plain(results), indent=1))
    card = render(results) + (f"\n{fgnet.render(results['fgnet'])}\n" if people else "")
    (out / "scorecard.md").write_text(card)
    click.echo(card)
    if results["wrong"]:
        raise click.ClickException("the scorecard is wrong: " + "; ".join(results["wrong"]))


def find_clips(media: tuple[Path, ...]) -> list[Path]:
    """Return the clips among files and, not recursively, folders."""
    found = []
    for path in media:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        found += [file for file in inside if path.is_file() or file.suffix.lower() in VIDEO_SUFFIXES]
    return found


if __name__ == "__main__":
    main()
