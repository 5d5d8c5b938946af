"""The coordinate network: where each pixel of a face's crop lies on the canonical face.

    python -m train.space.coordinates --faces runs/space/faces --archive utkface.tar --archive aaf.tar \
        --out runs/space/coordinates --minutes 90

Distilled from the mesh teacher: the network reads the principal components of the meshes, and the loss is the square
distance of the mesh that they make from the teacher's. The map made of them is measured at the mesh's points, at points
between them, and around the face's outline. Writes `coordinates.safetensors`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import click
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from faceage.checkpoint import Header, save
from faceage.geometry import WHOLE_FACE_TEMPLATE_5, apply_affine, similarity_to_template, template_5
from faceage.networks.space import CoordinateDims, CoordinateNet
from train.data import to_tensor
from train.run import EMA, Run, Script, device, git_commit
from train.space.canonical import CANONICAL_PX, OVAL, Canonical
from train.space.coordinate_maps import Shapes, fit, true_map
from train.space.faces import Heads, pictures_of

STORED_PX, CONTEXT = 176, 1.1
"""Side of the stored crops, and how much wider than the network's crop they are."""
RINGS = (1.08, 1.2)
"""Points outside the face: its outline, enlarged about its middle."""
DATASET = {"name": "UTKFace and All-Age-Faces (a part)", "licence": "non-commercial research only"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyper-parameters."""

    batch: int = 32
    rate: float = 1e-3
    weight_decay: float = 0.01
    landmark_noise: float = 0.012
    """Largest deviation of the landmarks that align a crop, as a fraction of its side; each face draws its own."""
    fitted_faces: int = 2_000
    """Faces for the linear part."""
    ema_half_life_images: int = 10_000
    tick_images: int = 8_000
    seed: int = 11


class Points:
    """The points at which the map is compared."""

    def __init__(self, canonical: Canonical, step_px: int = 7) -> None:
        inside, corners, weights = canonical.weights()
        y, x = np.divmod(inside, CANONICAL_PX)
        lattice = (x % step_px == 0) & (y % step_px == 0)
        self._corners, self._weights = corners[lattice], weights[lattice]
        self.canonical = self(canonical.points[None])[0]
        self._area = self._signed_area(canonical.points[None])

    def __call__(self, mesh: np.ndarray) -> np.ndarray:
        """Return the points [N, P, 2] of meshes [N, 468, 2]: its own, those between, and those around it."""
        between = np.einsum("pk,npkc->npc", self._weights, mesh[:, self._corners])
        outline = mesh[:, OVAL]
        middle = outline.mean(1, keepdims=True)
        rings = [middle + scale * (outline - middle) for scale in RINGS]
        return np.concatenate([mesh, between, *rings], 1)

    def seen(self, mesh: np.ndarray) -> np.ndarray:
        """Return 1 for points that look at the camera, 0 for those turned away: float32 [N, P]."""
        front = (self._signed_area(mesh) / self._area > 0.1).astype(np.float32)
        count = len(self.canonical) - front.shape[1] - mesh.shape[1]
        return np.concatenate([np.ones(mesh.shape[:2]), front, np.ones((len(mesh), count))], 1).astype(np.float32)

    def _signed_area(self, mesh: np.ndarray) -> np.ndarray:
        a, b, c = (mesh[:, self._corners[:, k]] for k in range(3))
        u, v = b - a, c - a
        return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]


def stored_crops(heads: Heads, archives: list[Path], folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return wide crops uint8 [N, S, S, 3] (a memory map), and meshes and landmarks in their pixels [N, 473, 2]."""
    template = (((WHOLE_FACE_TEMPLATE_5 - 0.5) / CONTEXT + 0.5) * STORED_PX - 0.5).astype(np.float32)
    matrices = similarity_to_template(heads.landmarks, template)
    file = folder / f"crops-{STORED_PX}.npy"
    if not file.exists():
        part = file.with_suffix(".part.npy")
        crops = np.lib.format.open_memmap(part, "w+", np.uint8, (len(heads), STORED_PX, STORED_PX, 3))
        rows = {name: i for i, name in enumerate(heads.names)}
        for name, picture in pictures_of(archives, set(rows)):
            i, size = rows[name], (STORED_PX, STORED_PX)
            crops[i] = cv2.warpAffine(picture, matrices[i], size, flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE)
        crops.flush()
        part.rename(file)
    points = np.concatenate([heads.mesh[..., :2], heads.landmarks], 1)
    return np.load(file, mmap_mode="r"), apply_affine(matrices, points)


def align(points: np.ndarray, noise: np.ndarray, random: np.random.Generator, size_px: int) -> np.ndarray:
    """Return the maps [N, 2, 3] into crops that inexact landmarks align, and write these into `points`.

    Args:
        points: [N, 473, 2], meshes and landmarks; the landmarks are moved.
        noise: [N], deviation of the landmarks, as a fraction of the crop's side.
        random: the deviations are drawn from it.
        size_px: side of the crop.
    """
    eyes = np.linalg.norm(points[:, 469] - points[:, 468], axis=-1)
    side = eyes / (WHOLE_FACE_TEMPLATE_5[1, 0] - WHOLE_FACE_TEMPLATE_5[0, 0])
    points[:, 468:] += random.normal(0, 1, (len(points), 5, 2)) * (noise * side)[:, None, None]
    return similarity_to_template(points[:, 468:], template_5(size_px, WHOLE_FACE_TEMPLATE_5))


def draw(
    crops: np.ndarray, points: np.ndarray, rows: np.ndarray, mirror: np.ndarray, random: np.random.Generator,
    noise: float, size_px: int, *, spoiled: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Return augmented crops uint8 [B, S, S, 3], meshes [B, 468, 2] in their pixels, and landmarks' offsets [B, 10].

    Args:
        crops: uint8 [N, T, T, 3], wider.
        points: float32 [N, 473, 2], their meshes and landmarks.
        rows: int64 [B], which faces.
        mirror: int64 [473], each point's counterpart on the other side.
        random: what is drawn is drawn from it.
        noise: largest deviation of the landmarks, as a fraction of the crop's side.
        size_px: S.
        spoiled: see `spoil`.
    """
    there = points[rows].astype(np.float32)
    flipped = random.random(len(rows)) < 0.5
    there[flipped] = (there[flipped] * (-1, 1) + (STORED_PX - 1, 0))[:, mirror]
    matrices = align(there, random.uniform(0, noise, len(rows)), random, size_px)
    moved = apply_affine(matrices, there)
    faces = []
    for row, flip, matrix in zip(rows, flipped, matrices, strict=True):
        face = crops[row][:, ::-1] if flip else crops[row]
        face = cv2.warpAffine(
            np.ascontiguousarray(face),
            matrix,
            (size_px, size_px),
            flags=cv2.INTER_AREA,
            borderMode=cv2.BORDER_REPLICATE,
        )
        faces.append(spoil(face, random) if spoiled else face)
    offsets = (moved[:, 468:] + 0.5) / size_px - WHOLE_FACE_TEMPLATE_5
    return np.stack(faces), moved[:, :468], offsets.reshape(len(rows), 10).astype(np.float32)


def spoil(face: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Make a face small, noisy, compressed, partly covered, or dark, as videos have them."""
    size = face.shape[0]
    if random.random() < 0.4:
        small = int(random.uniform(32, size))
        face = cv2.resize(cv2.resize(face, (small, small), interpolation=cv2.INTER_AREA), (size, size))
    if random.random() < 0.25:
        x, y = random.integers(0, size, 2)
        w, h = random.integers(size // 8, size // 2, 2)
        face[y : y + h, x : x + w] = random.integers(0, 256, 3)
    light = random.uniform(0.5, 1.2) * (1 + random.uniform(-0.12, 0.12, 3))
    gamma = math.exp(random.uniform(-0.4, 0.4))
    levels = np.arange(256)[:, None] / 255
    table = np.clip(255 * light * levels**gamma + random.uniform(-25, 25), 0, 255)
    face = cv2.LUT(face, table.astype(np.uint8)[:, None])
    if random.random() < 0.3:
        noise = random.normal(0, random.uniform(2, 12), face.shape[:2])[..., None]
        face = np.clip(face + noise, 0, 255).astype(np.uint8)
    return face


def read_map(uv: Tensor, points: Tensor, size_px: int) -> Tensor:
    """Return a map [N, C, M, M] of a crop read at points [N, P, 2] in the crop's pixels: [N, P, C]."""
    grid = (points + 0.5) / size_px * 2 - 1
    read = F.grid_sample(uv, grid[:, :, None], mode="bilinear", padding_mode="border", align_corners=False)
    return read[..., 0].permute(0, 2, 1)


def map_error(uv: Tensor, meshes: np.ndarray, points: Points, size_px: int) -> Tensor:
    """Return how far the canonical points of faces are off, in their maps [N, 2, M, M]: [N], fractions of the side."""
    want = torch.from_numpy(((points.canonical + 0.5) / CANONICAL_PX).astype(np.float32))
    off = read_map(uv, torch.from_numpy(points(meshes).astype(np.float32)), size_px) - want
    seen = torch.from_numpy(points.seen(meshes))
    return (off.square().sum(-1).sqrt() * seen).sum(1) / seen.sum(1)


@click.command(cls=Script, context_settings={"show_default": True})
@click.option("--faces", "folder", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--archive", "archives", type=click.Path(exists=True, path_type=Path), multiple=True, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder; resumed if it exists.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=90.0, help="Budget of all sessions.")
@click.option("--images", type=click.IntRange(1), help="Budget in images instead.")
def main(folder: Path, archives: tuple[Path, ...], out: Path, minutes: float, images: int | None) -> None:
    """Train the coordinate network."""
    cv2.setNumThreads(1)
    config, dims = Config(), CoordinateDims(size_px=128)
    size = dims.size_px
    torch.manual_seed(config.seed)
    run = Run(out, config, minutes, images, dims=dims)

    # Data: presence is a logit; turned and hidden faces stay in, wrong ones do not.
    heads = Heads.load(folder)
    canonical = Canonical.of(heads.rows(~heads.validation))
    mirror = np.concatenate([canonical.mirror, len(canonical.mirror) + np.array([1, 0, 2, 4, 3])])
    crops, mesh_and_landmarks = stored_crops(heads, list(archives), folder)
    good = heads.presence > 2
    train, val = np.flatnonzero(good & ~heads.validation), np.flatnonzero(good & heads.validation)[::4]
    points = Points(canonical)
    where = device()

    # What is fitted in closed form, from all training faces: the shapes, then the maps.
    random = np.random.default_rng(config.seed)
    exact = mesh_and_landmarks[train].astype(np.float32)
    moved = apply_affine(align(exact, random.uniform(0, config.landmark_noise, len(exact)), random, size), exact)
    offsets = ((moved[:, 468:] + 0.5) / size - WHOLE_FACE_TEMPLATE_5).reshape(len(moved), 10)
    shapes = Shapes.of(moved[:, :468], offsets, dims.shapes)
    net = CoordinateNet(dims)
    if not (out / "resume.pt").exists():
        some = random.choice(len(moved), config.fitted_faces, replace=False)
        maps = np.stack([true_map(mesh, canonical, size, dims.map_px) for mesh in moved[some, :468]])
        bias, linear = fit(maps, np.column_stack([offsets[some], shapes(moved[some, :468], offsets[some])]))
        with torch.no_grad():
            net.bias_map.copy_(torch.from_numpy(bias))
            net.maps.copy_(torch.from_numpy(linear))
    for fitted in (net.bias_map, net.maps):
        fitted.requires_grad_(False)
    net = net.to(where, memory_format=torch.channels_last)
    ema = EMA(net, config.ema_half_life_images)
    step = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], config.rate, weight_decay=config.weight_decay
    )
    parts = {"net": net, "ema": ema.net, "step": step}
    run.load_state(parts)
    random = np.random.default_rng((config.seed, run.images_seen))
    directions = torch.from_numpy(shapes.directions).to(where)

    def inputs(faces: np.ndarray, offsets: np.ndarray) -> tuple[Tensor, Tensor]:
        landmarks = torch.from_numpy(offsets).to(where) + net.template
        return to_tensor(faces).to(where, memory_format=torch.channels_last), landmarks

    ticks, losses = run.images_seen // config.tick_images, []
    is_over = run.is_over
    while not is_over:
        step.param_groups[0]["lr"] = config.rate * (0.5 + 0.5 * math.cos(math.pi * run.progress)) + 1e-6
        rows = random.choice(train, config.batch)
        faces, meshes, offsets = draw(crops, mesh_and_landmarks, rows, mirror, random, config.landmark_noise, size)
        off = net.shapes(*inputs(faces, offsets)) - torch.from_numpy(shapes(meshes, offsets)).to(where)
        loss = (off @ directions).unflatten(1, (-1, 2)).square().sum(-1).mean()  # square pixels
        step.zero_grad()
        loss.backward()
        step.step()
        run.images_seen += config.batch
        ema.update(net, config.batch, run.images_seen)
        losses.append(float(loss.detach()))
        is_over = run.is_over
        if run.images_seen // config.tick_images > ticks or is_over:
            ticks = run.images_seen // config.tick_images
            fixed, errors = np.random.default_rng(0), []
            for some in np.array_split(val, len(val) // 64 + 1):
                faces, meshes, offsets = draw(
                    crops, mesh_and_landmarks, some, mirror, fixed, config.landmark_noise, size, spoiled=False
                )
                with torch.inference_mode():
                    errors.append(map_error(ema.net(*inputs(faces, offsets)).cpu(), meshes, points, size))
            held_out = size * torch.cat(errors)
            metrics = {"val_error_px": float(held_out.mean()), "val_median_px": float(held_out.median())}
            run.record(mesh_px=math.sqrt(float(np.mean(losses))), **metrics)
            losses.clear()
            header = Header(
                arch="space-coordinates",
                dims=dataclasses.asdict(dims),
                stage="coordinates",
                images_seen=run.images_seen,
                dataset=DATASET,
                train_config=run.config,
                metrics=metrics,
                git_commit=git_commit(),
            )
            save(out / "coordinates.safetensors", ema.net.state_dict(), header)
            run.save_state(parts)


if __name__ == "__main__":
    main()
