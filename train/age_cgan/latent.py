"""Step 3 of Age-cGAN: latent optimization on faces of the validation split, measured.

    python -m train.age_cgan.latent --data utkface.tar --generator runs/gan/generator.safetensors \
        --encoder runs/encoder/encoder.safetensors --identity runs/identity/identity.safetensors \
        --teacher mobilefacenet_casia.ckpt --out runs/latent

Nothing is trained: the product optimizes each face's latent when it runs, with `faceage.agers.latent`. This script
shows what the choices are worth: the paper's pixel-wise and identity-preserving objectives and the product's mix of
both, by the product's step and by Adam, loss against time (`curves.png`, `latent.json`, `sheet.png`). Identity is
judged by the teacher, which is in no loss here, but taught the identity network that is.

Reference: Antipov et al. 2017, arXiv:1702.01983, section 2.3.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import click
import numpy as np
import torch

from faceage.agers.latent import LatentConfig, optimize_latents
from faceage.ages import age_to_classes
from faceage.checkpoint import load
from faceage.geometry import TEMPLATE_5, face_mask, similarity_to_template
from faceage.networks.age_cgan import AgeCGANDims, Encoder, Generator
from faceage.networks.latent import AutogradGradient, LatentObjective, LatentStep
from train.data import load_faces, to_tensor
from train.readers.identity import load_identity
from train.readers.teacher import TEMPLATE_96X112, embed, load_teacher
from train.run import Script, sheet

_PRODUCT = LatentConfig()
CHOICES = {
    "pixel-wise": replace(_PRODUCT, identity_weight=0.0),
    "identity-preserving": replace(_PRODUCT, pixel_weight=0.0),
    "both (product)": _PRODUCT,
}
BUDGETS = (1, 2, 4, 8, 12, 16, 24)
"""Evaluations a face at which the loss is looked at."""
ADAM_RATE = 0.1
"""Step length of the Adam that the product's step is compared with; it was not tuned."""


def adam(
    gradient_of: AutogradGradient, start: torch.Tensor, problem: tuple[torch.Tensor, ...], evaluations: int
) -> list[tuple[float, float]]:
    """Minimise by Adam, all faces all the time; return (seconds, mean loss) at each evaluation."""
    z, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    begin, after = perf_counter(), []
    for step in range(1, evaluations + 1):
        loss, gradient = gradient_of(z, *problem)
        after.append((perf_counter() - begin, float(loss.mean())))
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        z = z - ADAM_RATE * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
    return after


def teacher_view(faces: torch.Tensor) -> np.ndarray:
    """Warp aligned crops [N, 3, S, S] in [-1, 1] to the teacher's template; returns uint8 [N, 112, 96, 3]."""
    import cv2

    size = faces.shape[-1]
    (matrix,) = similarity_to_template((TEMPLATE_5 * size - 0.5)[None].astype(np.float32), TEMPLATE_96X112)
    pixels = ((faces.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return np.stack([cv2.warpAffine(np.ascontiguousarray(p), matrix, (96, 112), borderMode=1) for p in pixels])


@click.command(cls=Script, context_settings={"show_default": True})
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="UTKFace, a tar or a folder.")
@click.option(
    "--generator", type=click.Path(exists=True, path_type=Path), required=True, help="From train.age_cgan.gan."
)
@click.option(
    "--encoder", type=click.Path(exists=True, path_type=Path), required=True, help="From train.age_cgan.encoder."
)
@click.option(
    "--identity", type=click.Path(exists=True, path_type=Path), required=True, help="From train.readers.identity."
)
@click.option("--teacher", type=click.Path(exists=True, path_type=Path), required=True, help="Judges identity.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path("runs/cache"), help="Aligned faces.")
@click.option("--faces", "count", type=click.IntRange(1), default=128, help="Validation faces, drawn at random.")
def main(
    data: Path, generator: Path, encoder: Path, identity: Path, teacher: Path, out: Path, cache: Path, count: int
) -> None:
    """Measure latent optimization."""
    header, weights = load(generator, "age-cgan-generator")
    dims = AgeCGANDims(**header.dims)
    G, E = Generator(dims).eval(), Encoder(dims).eval()
    G.load_state_dict(weights)
    E.load_state_dict(load(encoder, "age-cgan-encoder")[1])
    FR = load_identity(identity)
    judge = load_teacher(teacher)

    root = E.latent_root.numpy()
    val = load_faces(data, dims.size_px, cache).val
    faces = val.rows(np.random.default_rng(0).choice(len(val), count, replace=False))
    x, y = to_tensor(faces.pixels).contiguous(), torch.from_numpy(age_to_classes(faces.ages))
    gradient_of = AutogradGradient(LatentObjective(G, FR, torch.tensor(face_mask(dims.size_px))))
    step = LatentStep(gradient_of)
    with torch.inference_mode():
        start, embedding = E(x).numpy(), FR(x)
        embedding = embedding.clone()
    real = embed(judge, teacher_view(x))

    def describe(z: np.ndarray) -> tuple[torch.Tensor, dict[str, float]]:
        with torch.inference_mode():
            made = G(torch.from_numpy(z), y)
            pixel = (made - x).square().mean((1, 2, 3))
            student = (FR(made) * embedding).sum(1)
        cosine = (embed(judge, teacher_view(made)) * real).sum(1)
        values = {"mse": pixel, "identity_cosine": student, "teacher_cosine": cosine}
        return made, {name: round(float(value.mean()), 4) for name, value in values.items()}

    results, rows, curves = {}, [x[:12]], {}
    made, results["encoder"] = describe(start)
    rows.append(made[:12])
    problem = y.numpy(), x.numpy(), embedding.numpy()

    def call(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(out.numpy() for out in step(*map(torch.from_numpy, arrays)))

    for name, config in CHOICES.items():
        begin = perf_counter()
        fit = optimize_latents(call, start, problem, config, root=root)
        seconds = perf_counter() - begin
        made, figures = describe(fit.latents)
        rows.append(made[:12])
        weights = torch.tensor([config.identity_weight, config.pixel_weight, config.prior_weight])
        track = adam(gradient_of, torch.from_numpy(start), (y, x, embedding, weights), BUDGETS[-1])
        # In runs of growing budgets: faces stop one by one, so a mean over time needs separate runs.
        curves[name] = {"Adam": track}
        for method, shape in (("in u (product)", root), ("in z", np.eye(dims.latent, dtype=np.float32))):
            points = []
            for budget in BUDGETS:
                begin = perf_counter()
                within = replace(config, max_evaluations=budget)
                partial = optimize_latents(call, start, problem, within, root=shape)
                points.append((perf_counter() - begin, float(partial.losses.mean())))
            curves[name][method] = points
        results[name] = figures | {
            "loss_at_encoder": round(float(fit.first_losses.mean()), 4),
            "loss": round(float(fit.losses.mean()), 4),
            "share_below_encoder": round(float((fit.losses < fit.first_losses).mean()), 4),
            "evaluations": round(float(fit.evaluations.mean()), 2),
            "seconds": round(seconds, 2),
            "adam_loss": round(track[-1][1], 4),
            "adam_seconds": round(track[-1][0], 2),
        }
    out.mkdir(parents=True, exist_ok=True)
    sheet(rows, out / "sheet.png", scale=2)
    _plot(curves, out / "curves.png")
    (out / "latent.json").write_text(json.dumps({"faces": count, "results": results, "curves": curves}, indent=1))
    click.echo(json.dumps(results, indent=1))


def _plot(curves: dict[str, dict[str, list[tuple[float, float]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 4))
    for axis, (name, by_method) in zip(axes, curves.items(), strict=True):
        for method, points in by_method.items():
            axis.plot(*zip(*points, strict=True), marker=".", label=method)
        axis.set(title=name, xlabel="seconds, all faces", ylabel="mean loss")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
