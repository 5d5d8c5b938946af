"""The compact identity network, distilled from a face-recognition teacher.

    python -m train.readers.identity --data utkface.tar --teacher mobilefacenet_casia.ckpt --out runs/identity \
        --minutes 12

The student reads 64-px crops in Age-cGAN's own alignment, so that a generated face goes straight in. It learns the
teacher's embedding of each (mirrored, shifted, recoloured, blurred) training face by cosine; the validation figures are
on faces that the student never saw. Writes `identity.safetensors`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch

from faceage.checkpoint import Header, load, save, sha256_of
from faceage.networks.regressors import IdentityNet, TrunkDims
from train.augment import degrade, shift_and_jitter
from train.data import DATASET, FaceSet, Sampler, load_faces, read_archive, to_tensor, warp_faces
from train.readers.teacher import TEMPLATE_96X112, embed, load_teacher
from train.run import EMA, Run, Script, autocast, device, git_commit, run_options

identity_option = click.option(
    "--identity", type=click.Path(exists=True, path_type=Path), required=True, help="From train.readers.identity."
)
"""The identity network of a loss, for `load_identity`."""


@dataclass(frozen=True)
class Config:
    """Hyper-parameters."""

    batch: int = 64
    rate: float = 1.5e-3
    weight_decay: float = 0.02
    relation_weight: float = 0.3
    """Weight of the batch's cosine table (Park et al., Relational Knowledge Distillation, CVPR 2019)."""
    ema_half_life_images: int = 20_000
    tick_images: int = 19_200
    seed: int = 3


def teacher_embeddings(archive: Path, teacher_file: Path, faces: FaceSet, cache: Path) -> torch.Tensor:
    """Return the teacher's embeddings of every face and of its mirror image, float32 [2, N, 128], cached."""
    which = hashlib.sha256(" ".join(faces.names).encode() + faces.landmarks.tobytes()).hexdigest()
    file = cache / f"teacher-{sha256_of(teacher_file)[:12]}-{which[:12]}.npy"
    if not file.exists():
        import cv2

        rows = {name: i for i, name in enumerate(faces.names.tolist())}
        pictures: list[np.ndarray] = [np.zeros(0)] * len(faces)
        for name, data in read_archive(archive):
            if name in rows:
                picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
                pictures[rows[name]] = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        aligned = warp_faces(pictures, faces.landmarks, TEMPLATE_96X112, 96, 112)
        with torch.random.fork_rng([]):  # a run that finds the cache must draw the same numbers as the first
            teacher = load_teacher(teacher_file)
        both = torch.stack([embed(teacher, aligned), embed(teacher, aligned[:, :, ::-1])])
        part = file.with_suffix(".part.npy")
        np.save(part, both.numpy())
        part.replace(file)
    return torch.from_numpy(np.load(file))


def load_identity(path: Path) -> IdentityNet:
    """Load an identity network, frozen, in evaluation mode."""
    header, weights = load(path, "identity")
    net = IdentityNet(TrunkDims(**header.dims))
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def validate(net: IdentityNet, pixels: np.ndarray, target: torch.Tensor) -> dict[str, float]:
    """Return the mean cosine with the teacher, and the correlation of both networks' pairwise cosines."""
    mine = torch.cat([net(to_tensor(pixels[i : i + 256]).to(target.device)) for i in range(0, len(pixels), 256)])
    upper = torch.triu_indices(len(mine), len(mine), 1)
    pairs = torch.stack([(mine @ mine.T)[upper[0], upper[1]], (target @ target.T)[upper[0], upper[1]]])
    return {"val_cosine": float((mine * target).sum(1).mean()), "val_pair_r": float(torch.corrcoef(pairs)[0, 1])}


@click.command(cls=Script, context_settings={"show_default": True})
@run_options(minutes=12.0)
@click.option(
    "--teacher", type=click.Path(exists=True, path_type=Path), required=True, help="MobileFaceNet checkpoint."
)
def main(data: Path, out: Path, cache: Path, minutes: float, images: int | None, teacher: Path) -> None:
    """Distil the identity network."""
    config, dims = Config(), TrunkDims(outputs=128)
    torch.manual_seed(config.seed)
    run = Run(out, config, minutes, images, dims=dims, parents={"teacher": teacher})
    faces = load_faces(data, dims.size_px, cache)
    where = device()
    targets = teacher_embeddings(data, teacher, faces, cache).to(where)
    train, val = faces.train, faces.val
    in_val = torch.from_numpy(faces.validation)
    train_targets, val_targets = targets[:, ~in_val], targets[0, in_val]
    sampler = Sampler(train, config.batch, config.seed, power=0.25)

    net = IdentityNet(dims).to(where, memory_format=torch.channels_last)
    ema = EMA(net, config.ema_half_life_images)
    step = torch.optim.AdamW(net.parameters(), config.rate, weight_decay=config.weight_decay)
    parts = {"net": net, "ema": ema.net, "step": step, "sampler": sampler}
    run.load_state(parts)

    ticks, cosines = run.images_seen // config.tick_images, []
    is_over = run.is_over
    while not is_over:
        step.param_groups[0]["lr"] = config.rate * (0.5 + 0.5 * math.cos(math.pi * run.progress)) + 1e-6
        rows = torch.from_numpy(sampler.indices())
        mirrored = torch.rand(len(rows)) < 0.5
        x = to_tensor(train.pixels[rows.numpy()])
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        want = train_targets[mirrored.long().to(where), rows.to(where)]
        x = shift_and_jitter(degrade(x).to(where), shift_px=2, colour=0.15)
        with autocast(where):
            got = net(x.contiguous(memory_format=torch.channels_last))
        cosine = (got * want).sum(1)
        relation = (got @ got.T - want @ want.T).square().mean() * len(x)
        loss = (1 - cosine).mean() + config.relation_weight * relation
        step.zero_grad()
        loss.backward()
        step.step()
        run.images_seen += len(x)
        ema.update(net, len(x), run.images_seen)
        cosines.append(float(cosine.detach().mean()))
        is_over = run.is_over  # read once a step: the last one must be saved
        if run.images_seen // config.tick_images > ticks or is_over:
            ticks = run.images_seen // config.tick_images
            metrics = validate(ema.net, val.pixels, val_targets)
            run.record(train_cosine=float(np.mean(cosines)), **metrics)
            cosines.clear()
            header = Header(
                arch="identity",
                dims=dataclasses.asdict(dims),
                stage="identity",
                images_seen=run.images_seen,
                dataset=DATASET | {"teacher": "MobileFaceNet, trained on CASIA-WebFace (non-commercial research only)"},
                parents=run.parents,
                train_config=run.config,
                metrics=metrics,
                git_commit=git_commit(),
            )
            save(out / "identity.safetensors", ema.net.state_dict(), header)
            run.save_state(parts)


if __name__ == "__main__":
    main()
