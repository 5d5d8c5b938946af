"""Speed of latent optimization, and what each evaluation of it is worth."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from faceage.agers.age_cgan import AgeCGAN
from faceage.align import prepare_crops
from faceage.bench.naive import naive_evaluations, naive_fit
from faceage.bench.runs import Notify
from faceage.errors import NoFaceError, UnsupportedError
from faceage.media.video import VideoReader
from faceage.pipeline.request import Networks
from faceage.types import FloatArray

EVALUATION_STEPS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Budgets at which the loss of latent optimization is looked at."""
LATENT_BATCHES = (1, 8, 32, 128)
"""Faces at once in latent optimization."""
LATENT_FACES = 32
"""Faces that latent optimization is timed on; more for larger batches."""
FOLLOWED_FRAMES = 40
"""Frames of a clip that a latent is followed through."""


def bench_latent(networks: Networks, faces: FloatArray, *, repeats: int = 2, notify: Notify) -> dict:
    """Measure latent optimization: batches of several sizes against eager torch and autograd, one face at a time.

    Torch's L-BFGS gets as many evaluations as it needs for the mean loss that ours reaches.

    Args:
        networks: from `load_networks`.
        faces: float32 [F, 3, S, S], RGB in [-1, 1], aligned. A batch that is larger has faces more than once.
        repeats: runs of each side.
        notify: told what runs.
    """
    ager, wanted = age_cgan_of(networks), age_cgan_of(networks).config
    (ages,) = networks.age_reader(faces)
    fit = ager.fit(faces, ages)
    loss = float(fit.losses.mean())
    notify("evaluations that eager torch needs for the same loss")
    evaluations = naive_evaluations(networks.model, faces, ages, wanted, loss)
    milliseconds: dict[int, list[float]] = {count: [] for count in LATENT_BATCHES}
    naive_milliseconds = []
    some = slice(LATENT_FACES)
    for number in range(1, repeats + 1):
        for count in LATENT_BATCHES:
            notify(f"batches of {count}, {number} of {repeats}")
            rows = np.arange(max(count, LATENT_FACES)) % len(faces)
            milliseconds[count].append(_fit_ms(ager, faces[rows], ages[rows], count))
        notify(f"eager torch, one face at a time, {number} of {repeats}")
        naive_milliseconds.append(naive_fit(networks.model, faces[some], ages[some], wanted, evaluations)[1])
    naive_ms = median(naive_milliseconds)
    batches = []
    for count, runs in milliseconds.items():
        ms = median(runs)
        row = {"ms_a_face": round(ms, 2), "faces_per_second": round(1e3 / ms, 1)}
        batches.append({"faces": count, **row, "factor_over_naive": round(naive_ms / ms, 2)})
    curve = []
    for budget in EVALUATION_STEPS:
        ager.config = replace(wanted, max_evaluations=budget, tolerance=0)
        curve.append({"evaluations": budget, "mean_loss": round(float(ager.fit(faces, ages).losses.mean()), 4)})
    ager.config = wanted
    naive_losses, _ = naive_fit(networks.model, faces, ages, wanted, evaluations)
    return {
        "faces": len(faces),
        "encoder_loss": round(float(fit.first_losses.mean()), 4),
        "loss": round(loss, 4),
        "share_below_encoder": round(float((fit.losses < fit.first_losses).mean()), 3),
        "evaluations_a_face": round(float(fit.evaluations.mean()), 1),
        "naive_loss": round(float(naive_losses.mean()), 4),
        "naive_evaluations_a_face": evaluations,
        "naive_ms_a_face": round(naive_ms, 2),
        "naive_faces_per_second": round(1e3 / naive_ms, 1),
        "batches": batches,
        "curve": curve,
    }


def _fit_ms(ager: AgeCGAN, faces: FloatArray, ages: FloatArray, count: int) -> float:
    """Optimize latents, `count` at once; return milliseconds a face."""
    start = perf_counter()
    for i in range(0, len(faces), count):
        ager.fit(faces[i : i + count], ages[i : i + count])
    return 1e3 * (perf_counter() - start) / len(faces)


def bench_follow(networks: Networks, clip: Path, *, notify: Notify) -> dict:
    """Measure how many evaluations a face needs whose latent begins at the one of the frame before.

    The largest face of each of the first `FOLLOWED_FRAMES` frames is fitted anew, from the encoder, and then from the
    frame before with every budget up to the one of a new face.

    Args:
        networks: from `load_networks`.
        clip: of one person.
        notify: told what runs.
    """
    ager, wanted = age_cgan_of(networks), age_cgan_of(networks).config
    (view,) = ager.views
    notify(f"the faces of {clip}")
    crops = []
    with VideoReader(clip) as reader:
        for frame in islice(reader, FOLLOWED_FRAMES):
            found = networks.detector.detect([frame])
            if len(found.boxes):
                sides = found.boxes[:, 2:] - found.boxes[:, :2]
                largest = [int(sides.prod(1).argmax())]
                one = found[np.array(largest)]
                made = prepare_crops([frame], one.frame_index, one.landmarks, view, view.sizes_px[0])
                crops.append(made.pixels)
    if len(crops) < 2:
        raise NoFaceError(
            f"{clip} shows a face in {len(crops)} of its first {FOLLOWED_FRAMES} frames; use another clip"
        )
    faces = np.concatenate(crops)
    age = np.median(networks.age_reader(faces)[0], keepdims=True).astype(np.float32)
    anew = ager.fit(faces, np.repeat(age, len(faces)))
    target = float(anew.losses[1:].mean())
    curve = []
    for budget in range(1, wanted.max_evaluations + 1):
        notify(f"from the frame before, {budget} evaluations")
        ager.config = replace(wanted, max_evaluations_known=budget)
        latents, losses = anew.latents[:1], []
        for i in range(1, len(faces)):
            fit = ager.fit(faces[i : i + 1], age, latents)
            latents = wanted.memory * latents + (1 - wanted.memory) * fit.latents
            losses.append(fit.losses[0])
        curve.append({"evaluations": budget, "mean_loss": round(float(np.mean(losses)), 4)})
    ager.config = wanted
    return {
        "frames": len(faces),
        "loss_anew": round(target, 4),
        "evaluations_anew": round(float(anew.evaluations[1:].mean()), 1),
        "encoder_loss": round(float(anew.first_losses[1:].mean()), 4),
        "needed": next((row["evaluations"] for row in curve if row["mean_loss"] <= target), None),
        "curve": curve,
    }


def age_cgan_of(networks: Networks) -> AgeCGAN:
    """Return the ager, which must be an Age-cGAN; UnsupportedError if it has no latents."""
    if not isinstance(networks.ager, AgeCGAN):
        raise UnsupportedError(f"model {networks.model} has no latents to optimize; choose an Age-cGAN model")
    return networks.ager
