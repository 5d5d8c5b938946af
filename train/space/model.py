"""The parameters of the space model: prototypes as a few maps, wrinkles of exemplars, and areas of the face.

    python -m train.space.model --faces runs/space/faces --prototypes runs/space/prototypes --out runs/space/model

Writes `space.safetensors`. The exemplars (`exemplars.txt`) were chosen by eye: even light, no fringe, glasses or beard,
clear creases; automatic choices took fringes, beards and watermarks.

Reference: Tiddeman, Burt, Perrett: Prototyping and Transforming Facial Textures for Perception Research, IEEE CG&A 2001
(means lose wrinkles); Weickert: Coherence-Enhancing Diffusion Filtering, IJCV 1999 (the structure tensor's coherence).
"""

from __future__ import annotations

import logging
from pathlib import Path

import click
import cv2
import numpy as np
import torch

from faceage.agers.canonical import LOG_OFFSET, CovariateBasis, age_features
from faceage.checkpoint import Header, save
from faceage.errors import CheckpointError
from faceage.kernels import RGB_LUMA
from train.run import Script, git_commit
from train.space.canonical import BROWS, CANONICAL_PX, EYES, LIPS, MOUTH, OVAL, Canonical
from train.space.coordinates import DATASET
from train.space.faces import Heads

log = logging.getLogger(__name__)

EXEMPLARS_FILE = Path(__file__).parent / "exemplars.txt"
MAPS, LUMA_PX, CHROMA_PX = 12, 128, 64
"""How many maps changes are mixed from, and their sides: finer ones add nothing that can be seen."""
EXPOSURE_PX, EXPOSURE_TAKEN = 28.0, 0.95
"""Width of the blur, and share of the blurred change, that is taken out: old and young were not lit alike."""
CREASE_BAND_PX = (0.8, 7.0)
COHERENCE = (0.25, 0.7)
"""Coherence of the structure tensor from which and to which a detail is taken for a crease: blotches have less."""
CREASE_SPREAD, EVENNESS = 0.042, 0.9
"""Deviation of log luma that the creases of all exemplars are brought toward, and how much of the way, in powers."""
NOSE = (197, 174, 217, 126, 129, 64, 98, 97, 2, 326, 327, 294, 358, 355, 437, 399)
"""Mesh points around the tip and the wings of the nose."""
KEPT_FROM_PX = {"eyes": 7, "brows": 2, "lips": 7, "nose": 1, "outline": 14}
"""How far creases stay from what is not skin, or is not where another face has it: there a difference of two faces is
one of their features, which would change the person and not the age."""
WRINKLE_PX = 192
"""Side at which creases are stored: they come from pictures of 200 pixels, in which faces are narrower than that."""
WRINKLE_RANGE = 0.5
"""Log ratio that int8 -127 and 127 stand for."""
RIM_PX = 26
"""Width over which the mask falls to 0 at the face's outline."""


def blur(x: np.ndarray, sigma: float, inside: np.ndarray) -> np.ndarray:
    """Return a Gaussian blur of x [S, S] or [S, S, C] that sees only the pixels of a mask [S, S]."""
    weight = cv2.GaussianBlur(inside, (0, 0), sigma) + 1e-4
    masked = x * (inside if x.ndim == 2 else inside[..., None])
    blurred = cv2.GaussianBlur(masked, (0, 0), sigma)
    return blurred / (weight if x.ndim == 2 else weight[..., None])


def areas(canonical: Canonical) -> dict[str, np.ndarray]:
    """Return the fields of `faceage.agers.canonical.Areas` at half their side, uint8 [128, 128]."""

    def soft(mask: np.ndarray, grow: int, sigma: float) -> np.ndarray:
        return cv2.GaussianBlur(cv2.dilate(mask, np.ones((grow, grow))), (0, 0), sigma)

    outline = (canonical.area(OVAL) > 0.5).astype(np.uint8)
    ramp = np.clip(cv2.distanceTransform(outline, cv2.DIST_L2, 5) / RIM_PX, 0, 1)
    parts = {
        "mask": ramp * ramp * (3 - 2 * ramp),
        "brows": soft(np.maximum(*(canonical.area(rim) for rim in BROWS)), 9, 3),
        "eyes": soft(np.maximum(*(canonical.area(rim) for rim in EYES)), 3, 1.2),
        "lips": soft(canonical.area(LIPS), 3, 1.5),
        "mouth": soft(canonical.area(MOUTH), 3, 1.5),
    }
    half = (CANONICAL_PX // 2, CANONICAL_PX // 2)
    return {
        name: np.rint(255 * cv2.resize(part.astype(np.float32), half, interpolation=cv2.INTER_AREA).clip(0, 1)).astype(
            np.uint8
        )
        for name, part in parts.items()
    }


def creased_skin(canonical: Canonical) -> np.ndarray:
    """Return where creases are taken from old faces: float32 [S, S], 1 on skin away from the features."""
    features = {
        "eyes": np.maximum(*(canonical.area(rim) for rim in EYES)),
        "brows": np.maximum(*(canonical.area(rim) for rim in BROWS)),
        "lips": canonical.area(LIPS),
        "nose": canonical.area(NOSE),
        "outline": 1 - canonical.area(OVAL),
    }
    skin = np.ones_like(features["nose"])
    for name, feature in features.items():
        away = cv2.distanceTransform((feature < 0.5).astype(np.uint8), cv2.DIST_L2, 5)
        skin = np.minimum(skin, np.clip((away - KEPT_FROM_PX[name]) / 6, 0, 1))
    return cv2.GaussianBlur(skin, (0, 0), 1.5)


def change_maps(coefficients: np.ndarray, features: np.ndarray, inside: np.ndarray) -> dict[str, np.ndarray]:
    """Return `mixing`, `luma` and `chroma` of `faceage.agers.canonical.CanonicalModel`.

    Args:
        coefficients: float32 [F, S, S, 3], log RGB per feature.
        features: float32 [N, F] of the training faces: their products say which coefficients are used together.
        inside: float32 [S, S], 1 on the face.
    """
    luma, chroma = [], []
    for rgb in coefficients:
        y = rgb @ RGB_LUMA
        colours = blur(np.stack([rgb[..., 0] - rgb[..., 1], rgb[..., 2] - rgb[..., 1]], -1), 2.0, inside)
        y = (y - EXPOSURE_TAKEN * blur(y, EXPOSURE_PX, inside)) * inside
        colours = (colours - blur(colours, EXPOSURE_PX, inside)) * inside[..., None]
        luma.append(cv2.resize(y, (LUMA_PX, LUMA_PX), interpolation=cv2.INTER_AREA))
        chroma.append(cv2.resize(colours, (CHROMA_PX, CHROMA_PX), interpolation=cv2.INTER_AREA))
    flat = np.concatenate([
        np.stack(luma).reshape(len(luma), -1), np.stack(chroma).reshape(len(chroma), -1) * (LUMA_PX / CHROMA_PX)
    ], 1)  # fmt: skip
    spread = np.linalg.cholesky(features.T @ features / len(features) + 1e-4 * np.eye(features.shape[1]))
    left, values, right = np.linalg.svd(spread.T @ flat, full_matrices=False)
    kept = np.square(values[:MAPS]).sum() / np.square(values).sum()
    log.info("%d maps hold %.4f of the prototypes' energy", MAPS, kept)
    mixing = (values[:MAPS, None] * left[:, :MAPS].T) @ np.linalg.inv(spread.T).T
    maps = right[:MAPS]
    count = LUMA_PX * LUMA_PX
    return {
        "mixing": mixing.astype(np.float32),
        "luma": maps[:, :count].reshape(MAPS, LUMA_PX, LUMA_PX),
        "chroma": maps[:, count:].reshape(MAPS, CHROMA_PX, CHROMA_PX, 2) * (CHROMA_PX / LUMA_PX),
    }


def creases(face: np.ndarray, prototype: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return what one face's creases are, log ratios [S, S].

    Args:
        face: uint8 [S, S, 3], canonical.
        prototype: float32 [S, S, 3], log RGB of the mean face of its age, light and appearance.
        inside: float32 [S, S], 1 on the face.
    """
    detail = (np.log(face.astype(np.float32) / 255 + LOG_OFFSET) - prototype) @ RGB_LUMA
    band = blur(detail, CREASE_BAND_PX[0], inside) - blur(detail, CREASE_BAND_PX[1], inside)
    smooth = blur(band, 1.2, inside)
    gx, gy = cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)
    xx, xy, yy = (cv2.GaussianBlur(p, (0, 0), 3) for p in (gx * gx, gx * gy, gy * gy))
    coherence = np.sqrt(np.square(xx - yy) + 4 * xy * xy) / (xx + yy + 1e-4)
    low, high = COHERENCE
    return band * cv2.GaussianBlur(np.clip((coherence - low) / (high - low), 0, 1), (0, 0), 1.0) * inside


@click.command(cls=Script)
@click.option("--faces", "folder", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--prototypes", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(folder: Path, prototypes: Path, out: Path) -> None:
    """Put the parameters together."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    heads = Heads.load(folder)
    canonical = Canonical.of(heads.rows(~heads.validation))
    inside = (canonical.area(OVAL) > 0.5).astype(np.float32)
    with np.load(prototypes / "prototypes.npz", allow_pickle=False) as data:
        fitted = {name: data[name] for name in data.files}
    with np.load(prototypes / "unwrapped.npz", allow_pickle=False) as data:
        names, ages, validation = (data[name] for name in ("names", "ages", "validation"))
    faces = np.load(prototypes / "unwrapped.npy", mmap_mode="r")
    kept, covariates = fitted["kept"], fitted["covariates"]
    features = age_features(ages[kept], covariates)
    coefficients = fitted["coefficients"][: features.shape[1]].astype(np.float32)
    arrays = change_maps(coefficients, features, inside)

    rows = {name: i for i, name in enumerate(names[kept])}
    wanted = EXEMPLARS_FILE.read_text().split()
    missing = [name for name in wanted if name not in rows]
    if missing or validation[kept].any():
        raise CheckpointError(f"{EXEMPLARS_FILE.name} names pictures that are not trained on: {missing[:3]}")
    chosen = np.array([rows[name] for name in wanted])
    wrinkles = np.stack([
        creases(faces[kept[i]], np.tensordot(features[i], coefficients, 1), inside) for i in chosen
    ])  # fmt: skip
    skin = creased_skin(canonical)
    wrinkles *= skin
    spread = np.sqrt((np.square(wrinkles) * skin).sum((1, 2)) / skin.sum())
    wrinkles *= ((CREASE_SPREAD / spread) ** EVENNESS)[:, None, None]
    side = (WRINKLE_PX, WRINKLE_PX)
    wrinkles = np.stack([cv2.resize(each, side, interpolation=cv2.INTER_AREA) for each in wrinkles])
    ys, xs = (np.flatnonzero(np.abs(wrinkles).max((0, axis)) > WRINKLE_RANGE / 254) for axis in (2, 1))
    top, bottom, left, right = ys[0], ys[-1] + 1, xs[0], xs[-1] + 1
    codes = np.clip(np.rint(wrinkles[:, top:bottom, left:right] * (127 / WRINKLE_RANGE)), -127, 127).astype(np.int8)
    basis = {f"basis.{name}": torch.from_numpy(fitted[f"basis.{name}"]) for name in CovariateBasis.__dataclass_fields__}
    tensors = basis | {
        "mixing": torch.from_numpy(arrays["mixing"]),
        "luma": torch.from_numpy(np.ascontiguousarray(arrays["luma"])).half(),
        "chroma": torch.from_numpy(np.ascontiguousarray(arrays["chroma"])).half(),
        "wrinkles": torch.from_numpy(codes),
        "wrinkle_scale": torch.tensor([WRINKLE_RANGE / 127]),
        "wrinkle_px": torch.tensor([WRINKLE_PX], dtype=torch.int32),
        "wrinkle_corner": torch.tensor([int(top), int(left)], dtype=torch.int32),
        "wrinkle_covariates": torch.from_numpy(covariates[chosen]),
        **{f"areas.{name}": torch.from_numpy(area) for name, area in areas(canonical).items()},
    }
    header = Header(
        arch="space",
        dims={"canonical_px": CANONICAL_PX, "maps": MAPS, "exemplars": len(chosen)},
        stage="model",
        images_seen=len(kept),
        dataset=DATASET,
        git_commit=git_commit(),
    )
    save(out / "space.safetensors", tensors, header)
    log.info("%s: %.1f MB", out / "space.safetensors", (out / "space.safetensors").stat().st_size / 1e6)


if __name__ == "__main__":
    main()
