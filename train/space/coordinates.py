"""The coordinate network: where each pixel of a face's crop lies on the canonical face.

    python -m train.space.coordinates --faces runs/space/faces --archive utkface.tar --archive aaf.tar \
        --out runs/space/coordinates --minutes 90

Distilled from the mesh teacher. The loss reads the network's map at the teacher's points (and at points between them,
and around the face's outline) and compares with where these points lie on the canonical face. Writes
`coordinates.safetensors`. Two CPU cores see about 60 faces a second.
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
from faceage.geometry import WHOLE_FACE_TEMPLATE_5, apply_affine, similarity_to_template
from faceage.networks.space import CoordinateNet, MapDims
from train.data import to_tensor
from train.run import EMA, Run, Script, device, git_commit
from train.space.canonical import CANONICAL_PX, ENLARGE, FACE_CENTRE, OVAL, Canonical
from train.space.faces import Heads, pictures_of
from train.space.landmark_maps import fit, true_map

STORED_PX, CONTEXT = 176, 1.1
"""Side of the stored crops, and how much wider than the network's crop they are."""
RINGS = (1.08, 1.2)
"""Points outside the face: its outline, enlarged about its middle."""
DATASET = {"name": "UTKFace and All-Age-Faces (a part)", "licence": "non-commercial research only"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyper-parameters."""

    batch: int = 16
    rate: float = 1.5e-3
    weight_decay: float = 0.01
    turn_degrees: float = 6.0
    """Bounds of the augmentation: the landmarks that align crops are off by so much."""
    zoom: float = 0.07
    shift: float = 0.025
    landmark_noise: float = 0.006
    """Deviation of the landmarks, as a fraction of the crop's side: what a video's are off by."""
    fitted_faces: int = 900
    """Faces for the linear part."""
    ema_half_life_images: int = 10_000
    tick_images: int = 4_000
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


def draw(
    crops: np.ndarray, points: np.ndarray, rows: np.ndarray, canonical: Canonical, random: np.random.Generator,
    config: Config, size_px: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Return augmented crops uint8 [B, S, S, 3], meshes [B, 468, 2] in their pixels, and landmarks [B, 5, 2].

    Args:
        crops: uint8 [N, T, T, 3], wider.
        points: float32 [N, 473, 2], their meshes and landmarks.
        rows: int64 [B], which faces.
        canonical: the canonical face.
        random: what is drawn is drawn from it.
        config: how much is changed.
        size_px: S.
    """
    mirror = np.concatenate([canonical.mirror, len(canonical.mirror) + np.array([1, 0, 2, 4, 3])])
    faces, moved = [], []
    for row in rows:
        angle = random.uniform(-1, 1) * config.turn_degrees
        scale = size_px * CONTEXT / STORED_PX * math.exp(random.uniform(-1, 1) * config.zoom)
        matrix = cv2.getRotationMatrix2D(((STORED_PX - 1) / 2, (STORED_PX - 1) / 2), angle, scale)
        matrix[:, 2] += (size_px - STORED_PX) / 2 + random.uniform(-1, 1, 2) * config.shift * size_px
        matrix = matrix.astype(np.float32)
        face = cv2.warpAffine(crops[row], matrix, (size_px, size_px), borderMode=cv2.BORDER_REPLICATE)
        there = apply_affine(matrix[None], points[row][None])[0]
        if random.random() < 0.5:
            face = face[:, ::-1]
            there = (there * (-1, 1) + (size_px - 1, 0))[mirror]
        faces.append(spoil(np.ascontiguousarray(face), random))
        moved.append(there)
    both = np.stack(moved).astype(np.float32)
    landmarks = both[:, -5:] + random.normal(0, config.landmark_noise * size_px, (len(both), 5, 2)).astype(np.float32)
    return np.stack(faces), both[:, :-5], landmarks


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
    light = random.uniform(0.5, 1.4) * (1 + random.uniform(-0.12, 0.12, 3))
    gamma = math.exp(random.uniform(-0.4, 0.4))
    levels = np.arange(256)[:, None] / 255
    table = np.clip(255 * light * levels**gamma + random.uniform(-25, 25), 0, 255)
    face = cv2.LUT(face, table.astype(np.uint8)[:, None])
    if random.random() < 0.3:
        noise = random.normal(0, random.uniform(2, 12), face.shape[:2])[..., None]
        face = np.clip(face + noise, 0, 255).astype(np.uint8)
    return face


def read_map(uv: Tensor, points: Tensor, size_px: int) -> Tensor:
    """Return a map [N, C, S/2, S/2] read at points [N, P, 2] in pixels of the crop: [N, P, C]."""
    grid = (points + 0.5) / size_px * 2 - 1
    read = F.grid_sample(uv, grid[:, :, None], mode="bilinear", padding_mode="border", align_corners=False)
    return read[..., 0].permute(0, 2, 1)


def identity_map(size_px: int) -> Tensor:
    """Return the map of a face that is the canonical one: [2, S/2, S/2], fractions of its side."""
    axis = (torch.arange(size_px // 2) + 0.5) / (size_px // 2)
    y, x = torch.meshgrid((axis - FACE_CENTRE) * ENLARGE + 0.5, (axis - 0.5) * ENLARGE + 0.5, indexing="ij")
    return torch.stack([x, y])


@click.command(cls=Script, context_settings={"show_default": True})
@click.option("--faces", "folder", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--archive", "archives", type=click.Path(exists=True, path_type=Path), multiple=True, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder; resumed if it exists.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=90.0, help="Budget of all sessions.")
@click.option("--images", type=click.IntRange(1), help="Budget in images instead.")
def main(folder: Path, archives: tuple[Path, ...], out: Path, minutes: float, images: int | None) -> None:
    """Train the coordinate network."""
    cv2.setNumThreads(1)
    config, dims = Config(), MapDims(size_px=128, outputs=2, scale=0.02, widths=(16, 24, 48, 72, 96))
    size = dims.size_px
    torch.manual_seed(config.seed)
    run = Run(out, config, minutes, images, dims=dims)

    # Data: presence is a logit; turned and hidden faces stay in, wrong ones do not.
    heads = Heads.load(folder)
    canonical = Canonical.of(heads.rows(~heads.validation))
    crops, mesh_and_landmarks = stored_crops(heads, list(archives), folder)
    good = heads.presence > 2
    train, val = np.flatnonzero(good & ~heads.validation), np.flatnonzero(good & heads.validation)[::8]
    points = Points(canonical)
    want = torch.from_numpy(((points.canonical + 0.5) / CANONICAL_PX).astype(np.float32))
    where = device()
    random = np.random.default_rng(config.seed)

    # Networks
    net = CoordinateNet(dims)
    if not (out / "resume.pt").exists():
        _, meshes, landmarks = draw(
            crops, mesh_and_landmarks, random.choice(train, config.fitted_faces), canonical, random, config, size
        )
        maps = np.stack([true_map(mesh, canonical, size) for mesh in meshes])
        offsets = (landmarks + 0.5) / size - WHOLE_FACE_TEMPLATE_5
        bias, linear = fit(maps, offsets.reshape(len(maps), 10), identity_map(size).numpy())
        with torch.no_grad():
            net.net.bias_map.copy_(torch.from_numpy(bias) / dims.scale)
            net.landmark_maps.copy_(torch.from_numpy(linear))
            net.net.head.weight.mul_(0.1)
            net.net.head.bias.zero_()
    net.landmark_maps.requires_grad_(False)
    net = net.to(where, memory_format=torch.channels_last)
    ema = EMA(net, config.ema_half_life_images)
    # Gradients of the deepest layers are as small as Adam's usual epsilon, which would stop them.
    step = torch.optim.AdamW(net.net.parameters(), config.rate, weight_decay=config.weight_decay, eps=1e-12)
    parts = {"net": net, "ema": ema.net, "step": step}
    run.load_state(parts)
    random = np.random.default_rng((config.seed, run.images_seen))

    def errors(network: CoordinateNet, faces: np.ndarray, meshes: np.ndarray, landmarks: np.ndarray) -> Tensor:
        x = to_tensor(faces).to(where, memory_format=torch.channels_last)
        uv = network(x, torch.from_numpy((landmarks + 0.5) / size).flatten(1).to(where))
        off = read_map(uv, torch.from_numpy(points(meshes).astype(np.float32)), size) - want
        seen = torch.from_numpy(points.seen(meshes))
        return (torch.sqrt(off.square().sum(-1) + 1e-6) * seen).sum(1) / seen.sum(1)  # [N], fractions of the side

    ticks, losses = run.images_seen // config.tick_images, []
    is_over = run.is_over
    while not is_over:
        step.param_groups[0]["lr"] = config.rate * (0.5 + 0.5 * math.cos(math.pi * run.progress)) + 1e-6
        rows = random.choice(train, config.batch)
        loss = errors(net, *draw(crops, mesh_and_landmarks, rows, canonical, random, config, size)).mean()
        step.zero_grad()
        (size * loss).backward()
        step.step()
        run.images_seen += config.batch
        ema.update(net, config.batch, run.images_seen)
        losses.append(float(loss.detach()))
        is_over = run.is_over
        if run.images_seen // config.tick_images > ticks or is_over:
            ticks = run.images_seen // config.tick_images
            fixed = np.random.default_rng(0)
            with torch.inference_mode():
                held_out = torch.cat([
                    errors(ema.net, *draw(crops, mesh_and_landmarks, val[i : i + 64], canonical, fixed, config, size))
                    for i in range(0, len(val), 64)
                ])  # fmt: skip
            metrics = {"val_error_px": float(held_out.mean()) * size, "val_median_px": float(held_out.median()) * size}
            run.record(error_px=float(np.mean(losses)) * size, **metrics)
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
