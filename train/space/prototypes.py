"""Age prototypes: the mean face of each age, pixel by pixel on the canonical face, given light, colours and appearance.

    python -m train.space.prototypes --faces runs/space/faces --archive utkface.tar --archive aaf.tar \
        --identity faceage/models/identity.safetensors --out runs/space/prototypes

For each canonical pixel, log RGB is regressed on age and on what else a picture shows (ridge regression):

    log(RGB + 0.04) = sum_k hat_k(age) (B_k + sum_j c_j C_kj) + sum_m n_m D_m

hat_k are piecewise linear in age; c are covariates that the product measures too (light, colours, appearance; see
`faceage.agers.canonical`); n are nuisances (pose and expression, sharpness, dataset) that cancel in a difference
of two ages. The change from one age to another at the same c is then linear in (hat(target) - hat(source)) x (1, c).

Reference: Burt and Perrett, Proc. R. Soc. B 1995 (differences of age prototypes); Kemelmacher-Shlizerman et al., CVPR
2014 (at the light of the face that is aged).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import click
import cv2
import numpy as np
import torch

from faceage.agers.canonical import LOG_OFFSET, CovariateBasis, age_features, hats
from faceage.checkpoint import load
from faceage.geometry import similarity_to_template, template_5
from faceage.networks.regressors import IdentityNet, TrunkDims
from train.data import to_tensor
from train.run import Script
from train.space.canonical import CANONICAL_PX, MAX_TURN, Canonical, Unwrap, in_crop, turns
from train.space.faces import Heads, pictures_of

log = logging.getLogger(__name__)

MIN_SHARPNESS, MIN_CHROMA, YOUNGEST_YEARS = 0.014, 7.0, 10
"""Faces below these are left out: blurred, grey, or with the proportions of children."""
THUMBNAIL_PX, FACE_PX = 16, 64
LIGHTS, APPEARANCES, POSES = 5, 16, 8
"""Covariates: principal components of the thumbnail's light, of the embedding, and of the mesh."""
HAT_RIDGE, SMOOTH_RIDGE, COVARIATE_RIDGE, NUISANCE_RIDGE = 2.0, 60.0, 1500.0, 20.0
ROUNDS, OUTLIER = 3, 0.25
"""The regression is repeated on logs cut to its last fit and this much around it: fringes, glasses and hands would
otherwise be taken for what age changes."""
_CHUNK = 256


def sharpness(face: np.ndarray) -> float:
    """Return the spread of a canonical face's fine band (finer than 2 pixels) of log luma, on both cheeks."""
    luma = np.log(face.astype(np.float32).mean(-1) / 255 + LOG_OFFSET)
    fine = luma - cv2.GaussianBlur(luma, (0, 0), 2.0)
    rows = slice(int(0.4 * CANONICAL_PX), int(0.7 * CANONICAL_PX))
    return float(fine[rows, int(0.2 * CANONICAL_PX) : int(0.8 * CANONICAL_PX)].std())


def unwrap_all(heads: Heads, archives: list[Path], out: Path) -> None:
    """Write the canonical pictures of faces, their thumbnails and their sharpness, once."""
    if (out / "unwrapped.npz").exists():
        return
    canonical = Canonical.of(heads.rows(~heads.validation))
    unwrap = Unwrap(canonical)
    kept = np.flatnonzero((np.abs(turns(heads.mesh)) < MAX_TURN) & (heads.presence > 15) & (heads.ages >= 8))
    log.info("%d of %d faces are frontal", len(kept), len(heads))
    heads = heads.rows(kept)
    rows = {name: i for i, name in enumerate(heads.names)}
    shape = (len(heads), CANONICAL_PX, CANONICAL_PX, 3)
    faces = np.lib.format.open_memmap(out / "unwrapped.npy", "w+", np.uint8, shape)
    matrices = similarity_to_template(heads.landmarks, template_5(FACE_PX))
    crops = np.zeros((len(heads), FACE_PX, FACE_PX, 3), np.uint8)
    sharp, chroma, side = (np.zeros(len(heads), np.float32) for _ in range(3))
    for name, picture in pictures_of(archives, set(rows)):
        i = rows[name]
        faces[i] = np.clip(unwrap(picture, heads.mesh[i]), 0, 255)
        size = (FACE_PX, FACE_PX)
        crops[i] = cv2.warpAffine(picture, matrices[i], size, flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE)
        sharp[i] = sharpness(faces[i])
        middle = faces[i, 96:160, 64:192].reshape(-1, 3).astype(np.float32)
        chroma[i] = np.abs(middle - middle.mean(1, keepdims=True)).mean()
        side[i] = np.linalg.norm(heads.mesh[i, 454, :2] - heads.mesh[i, 234, :2])
    faces.flush()
    columns = {name: getattr(heads, name) for name in Heads.__dataclass_fields__}
    np.savez(out / "unwrapped.npz", **columns, crops=crops, sharpness=sharp, chroma=chroma, side_px=side)


@torch.inference_mode()
def embed(crops: np.ndarray, identity: Path) -> np.ndarray:
    """Return the identity network's unit embeddings [N, D] of aligned crops uint8 [N, 64, 64, 3]."""
    header, weights = load(identity, "identity")
    net = IdentityNet(TrunkDims(**header.dims))
    net.load_state_dict(weights)
    net.eval()
    return torch.cat([net(to_tensor(crops[i : i + 256])) for i in range(0, len(crops), 256)]).numpy()


def thumbnails_of(crops: np.ndarray) -> np.ndarray:
    """Return what the pipeline gives agers: float32 [N, 3, 16, 16], RGB in [-1, 1], of crops uint8 [N, 64, 64, 3]."""
    times = FACE_PX // THUMBNAIL_PX
    blocks = crops.reshape(-1, THUMBNAIL_PX, times, THUMBNAIL_PX, times, 3).astype(np.float32)
    return blocks.mean((2, 4)).transpose(0, 3, 1, 2) / 127.5 - 1


def principal(x: np.ndarray, count: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted mean [D] and the first `count` principal directions [count, D] of rows [N, D]."""
    mean = weights @ x / weights.sum()
    centred = x - mean
    _, vectors = np.linalg.eigh((centred * weights[:, None]).T @ centred)
    return mean.astype(np.float32), vectors[:, ::-1].T[:count].astype(np.float32)


def age_weights(ages: np.ndarray) -> np.ndarray:
    """Return weights with mean 1 that lift rare ages: five-year bins of n faces get n^0.4 of the mass."""
    bins = np.minimum(ages // 5, 17).astype(int)
    weights = np.bincount(bins, minlength=18).astype(np.float64)[bins] ** -0.6
    return weights / weights.mean()


def fit_basis(thumbnails: np.ndarray, embeddings: np.ndarray, ages: np.ndarray, weights: np.ndarray) -> CovariateBasis:
    """Return the covariates' basis: principal directions, and what of them goes with age, which is taken out."""
    luma = CovariateBasis.logs(thumbnails).mean(1)
    light_mean, light = principal(luma, LIGHTS, weights)
    _, appearance = principal(embeddings, APPEARANCES, weights)
    count, H = LIGHTS + 2 + APPEARANCES, hats(ages)
    plain = CovariateBasis(
        light=light, light_mean=light_mean, appearance=appearance,
        by_age=np.zeros((H.shape[1], count), np.float32), scale=np.ones(count, np.float32),
    )  # fmt: skip
    raw = plain.raw(thumbnails, embeddings)
    by_age = np.linalg.solve((H.T * weights) @ H + 5 * np.eye(H.shape[1]), (H.T * weights) @ raw)
    spread = np.sqrt((weights[:, None] * np.square(raw - H @ by_age)).sum(0) / weights.sum())
    return replace(plain, by_age=by_age.astype(np.float32), scale=spread.astype(np.float32))


def design(
    columns: dict[str, np.ndarray], covariates: np.ndarray, canonical: Canonical
) -> tuple[np.ndarray, np.ndarray]:
    """Return the design matrix [N, F] and the diagonal and smoothing penalties [F, F]."""
    mesh = in_crop(columns["mesh"], columns["landmarks"], CANONICAL_PX).reshape(len(covariates), -1)
    mean, poses = principal(mesh, POSES, np.ones(len(mesh)))
    pose = (mesh - mean) @ poses.T
    sharp = np.log(columns["sharpness"])[:, None]
    nuisance = np.concatenate([pose, sharp, sharp**2, columns["dataset"][:, None]], 1)
    nuisance = (nuisance - nuisance.mean(0)) / nuisance.std(0)
    features = age_features(columns["ages"], covariates)
    hat_count, covariate_count = 8, features.shape[1] - 8
    penalty = np.diag(np.repeat(
        [HAT_RIDGE, COVARIATE_RIDGE, NUISANCE_RIDGE], [hat_count, covariate_count, nuisance.shape[1]]
    ).astype(np.float64))  # fmt: skip
    bend = np.diff(np.eye(hat_count), 2, axis=0)
    penalty[:hat_count, :hat_count] += SMOOTH_RIDGE * bend.T @ bend
    return np.concatenate([features, nuisance], 1), penalty


@click.command(cls=Script)
@click.option("--faces", "folder", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--archive", "archives", type=click.Path(exists=True, path_type=Path), multiple=True, required=True)
@click.option("--identity", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(folder: Path, archives: tuple[Path, ...], identity: Path, out: Path) -> None:
    """Fit the prototypes."""
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8.0f ms  %(message)s")
    out.mkdir(parents=True, exist_ok=True)
    heads = Heads.load(folder)
    unwrap_all(heads, list(archives), out)
    canonical = Canonical.of(heads.rows(~heads.validation))

    # Faces and covariates
    with np.load(out / "unwrapped.npz", allow_pickle=False) as data:
        columns = {name: data[name] for name in data.files}
    kept = np.flatnonzero(
        ~columns["validation"] & (columns["sharpness"] > MIN_SHARPNESS) & (columns["chroma"] > MIN_CHROMA)
        & (columns["ages"] >= YOUNGEST_YEARS)
    )  # fmt: skip
    columns = {name: value[kept] for name, value in columns.items()}
    faces = np.load(out / "unwrapped.npy", mmap_mode="r")
    ages, weights = columns["ages"], age_weights(columns["ages"])
    thumbnails, embeddings = thumbnails_of(columns["crops"]), embed(columns["crops"], identity)
    basis = fit_basis(thumbnails, embeddings, ages, weights)
    covariates = basis(thumbnails, embeddings, ages)
    log.info("%d faces, covariates measured", len(kept))

    # Ridge regression, pixel by pixel
    X, penalty = design(columns, covariates, canonical)
    table = np.log(np.arange(256, dtype=np.float32) / 255 + LOG_OFFSET)
    gram = (X.T * weights) @ X + penalty
    X32 = X.astype(np.float32)
    coefficients = np.zeros((X.shape[1], 0), np.float32)
    for _ in range(ROUNDS):
        moments = np.zeros((X.shape[1], CANONICAL_PX * CANONICAL_PX * 3), np.float32)
        for start in range(0, len(kept), _CHUNK):
            rows = slice(start, start + _CHUNK)
            logs = table[faces[kept[rows]]].reshape(len(kept[rows]), -1)
            if coefficients.size:
                fitted = X32[rows] @ coefficients
                np.clip(logs, fitted - OUTLIER, fitted + OUTLIER, out=logs)
            moments += (X32[rows] * weights[rows, None].astype(np.float32)).T @ logs
        coefficients = np.linalg.solve(gram, moments.astype(np.float64)).astype(np.float32)
        log.info("prototypes fitted")
    np.savez(
        out / "prototypes.npz",
        coefficients=coefficients.reshape(-1, CANONICAL_PX, CANONICAL_PX, 3),
        covariates=covariates, kept=kept, X=X.astype(np.float32),
        **{f"basis.{name}": getattr(basis, name) for name in CovariateBasis.__dataclass_fields__},
    )  # fmt: skip


if __name__ == "__main__":
    main()
