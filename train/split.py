"""The fixed split of UTKFace: which pictures are for validation, and never trained on.

    python -m train.split --data utkface.tar --teacher mobilefacenet_casia.ckpt

Writes `train/validation.txt`, the names of the validation pictures, which is part of the repository: every script
splits by it. UTKFace has no identity labels and several pictures of many people, so pictures are clustered twice.
Pictures of one shoot, whose thumbnails correlate, are drawn together: the hash of the first one's name draws a
tenth of the shoots for validation. Then pictures of one person, whose teacher's embeddings are close, are clustered by
single linkage, and a cluster that has a picture on either side goes to training as a whole.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import click
import numpy as np

from train.data import VALIDATION_FILE, align_archive
from train.readers.identity import teacher_embeddings
from train.run import Script

VALIDATION_SHARE = 0.1
SAME_SHOOT_CORRELATION = 0.96
"""Of 16x16 thumbnails, less the mean thumbnail."""
SAME_PERSON_COSINE = 0.65
"""Of the teacher's embeddings: 0.57 is reached by one pair of strangers in a thousand. Small children are all alike to
the teacher and form one large cluster."""


@click.command(cls=Script, context_settings={"show_default": True})
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="UTKFace, a tar or a folder.")
@click.option("--teacher", type=click.Path(exists=True, path_type=Path), required=True, help="Tells people apart.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path("runs/cache"), help="Aligned faces.")
def main(data: Path, teacher: Path, cache: Path) -> None:
    """Write the names of the validation pictures."""
    faces = align_archive(data, 16, cache)
    thumbnails = faces.pixels.mean(3).reshape(len(faces), -1).astype(np.float32)
    thumbnails -= thumbnails.mean(0)  # what every face has in common says nothing
    thumbnails -= thumbnails.mean(1, keepdims=True)
    shoots = clusters(thumbnails, SAME_SHOOT_CORRELATION)
    drawn = np.array([_uniform(name) for name in faces.names])[shoots] < VALIDATION_SHARE
    people = clusters(teacher_embeddings(data, teacher, faces, cache).mean(0).numpy(), SAME_PERSON_COSINE)
    straddles = np.isin(people, people[drawn]) & np.isin(people, people[~drawn])
    kept = drawn & ~straddles
    VALIDATION_FILE.write_text("".join(f"{name}\n" for name in faces.names[kept]))
    click.echo(
        f"{len(faces)} pictures: {len(np.unique(shoots))} shoots, {len(np.unique(people))} clusters of one person "
        f"(largest {np.bincount(people).max()}); {drawn.sum()} drawn, {(drawn & straddles).sum()} of them left to "
        f"training as their cluster straddles, {kept.sum()} for validation"
    )


def clusters(vectors: np.ndarray, cosine: float) -> np.ndarray:
    """Cluster vectors [N, D] by single linkage.

    Returns:
        int [N]: for each vector the index of its cluster's first one.
    """
    unit = vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-6)
    group = np.arange(len(unit))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    for start in range(0, len(unit), 1024):
        rows, columns = np.nonzero(unit[start : start + 1024] @ unit.T > cosine)
        for i, j in zip(rows + start, columns, strict=True):
            if i < j:
                a, b = root(int(i)), root(int(j))
                group[max(a, b)] = min(a, b)
    return np.array([root(i) for i in range(len(unit))])


def _uniform(name: str) -> float:
    return int(hashlib.sha256(str(name).encode()).hexdigest()[:8], 16) / 2**32


if __name__ == "__main__":
    main()
