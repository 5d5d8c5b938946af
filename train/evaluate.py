"""What the bundled model does to validation faces: the age that is read off them, and who they still are.

    python -m train.evaluate --data utkface.tar --teacher mobilefacenet_casia.ckpt

Faces of 20 to 35 years from the validation split are aged with the product's own ager and mask. The age is read by the
bundled age estimator, which is in no loss of the generator but was trained on the same faces, so it flatters; identity
is the cosine of the teacher's embeddings, which is in no loss but taught the identity network. Beside them: the
untouched faces, real faces of the target age, and a baseline that adds the difference of the mean face of the target
age and the mean face of 20 to 35.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import torch

from faceage.geometry import face_mask
from faceage.pipeline.request import load_networks
from train.data import load_faces, to_tensor
from train.latent import teacher_view
from train.teacher import embed, load_teacher

YOUNG = (20, 35)
TARGETS_YEARS = (40, 50, 60, 70)
REAL_WITHIN_YEARS = 5


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="UTKFace, a tar or a folder.")
@click.option("--teacher", type=click.Path(exists=True, path_type=Path), required=True, help="Judges identity.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path("runs/cache"), help="Aligned faces.")
@click.option("--faces", "count", type=click.IntRange(1), default=96, help="Validation faces, drawn at random.")
def main(data: Path, teacher: Path, cache: Path, count: int) -> None:
    """Measure the bundled model."""
    networks = load_networks()
    judge = load_teacher(teacher)
    size = networks.ager.size_px
    faces = load_faces(data, size, cache)
    val, train = faces.val, faces.train
    young = np.flatnonzero((val.ages >= YOUNG[0]) & (val.ages <= YOUNG[1]))
    x = _pixels(val.pixels[np.random.default_rng(0).choice(young, count, replace=False)])
    (present,) = networks.age_reader(x)
    before = embed(judge, teacher_view(torch.from_numpy(x)))
    mask = face_mask(size)
    mean_young = _pixels(train.pixels[(train.ages >= YOUNG[0]) & (train.ages <= YOUNG[1])]).mean(0)

    def describe(delta: np.ndarray) -> dict[str, float]:
        made = np.clip(x + mask * delta, -1, 1).astype(np.float32)
        (read,) = networks.age_reader(made)
        cosine = (before * embed(judge, teacher_view(torch.from_numpy(made)))).sum(1)
        return {"age_read": round(float(read.mean()), 1), "teacher_cosine": round(float(cosine.mean()), 3)}

    click.echo(json.dumps({"untouched": {"age_read": round(float(present.mean()), 1)}}))
    for target in TARGETS_YEARS:
        near = (np.abs(val.ages - target) <= REAL_WITHIN_YEARS, np.abs(train.ages - target) <= REAL_WITHIN_YEARS)
        (real,) = networks.age_reader(_pixels(val.pixels[near[0]]))
        aged = networks.ager.age(x, present, np.full(count, target, np.float32))
        row = {
            "target": target,
            "faceage": describe(aged.deltas),
            "mean_difference": describe(_pixels(train.pixels[near[1]]).mean(0) - mean_young),
            "real_faces_age_read": round(float(real.mean()), 1),
        }
        click.echo(json.dumps(row))


def _pixels(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(to_tensor(pixels).numpy())


if __name__ == "__main__":
    main()
