"""The baselines of the measurements: the same networks, the way a first script would run them.

facenet-pytorch's MTCNN photo by photo, eager torch face by face, autograd for the latent, and the whole picture warped.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageOps

from faceage.agers.latent import LatentConfig
from faceage.agers.programs import generator_program, reader_program
from faceage.ages import age_to_classes
from faceage.align import align_faces
from faceage.checkpoint import read_header
from faceage.geometry import face_mask
from faceage.models import find_model
from faceage.pipeline.request import AgeRequest
from faceage.types import FloatArray

if TYPE_CHECKING:
    from torch import Tensor, nn


NAIVE_STEPS = (*range(2, 20), *range(20, 65, 4))
"""Evaluations a face that the baseline may take: no coarser, or it would be made to do more than it needs."""


class _Networks:
    """A model's networks in eager torch."""

    def __init__(self, model: str) -> None:
        import torch

        from faceage.networks.latent import LatentObjective

        files = find_model(model)
        self.generator: nn.Module = generator_program(files.generator).build()[0]
        self.encoder, self.age, self.identity = (
            reader_program(path).build()[0] for path in (files.encoder, files.age, files.identity)
        )
        self.size_px = read_header(files.generator).dims["size_px"]
        mask = torch.tensor(face_mask(self.size_px))
        self.objective = LatentObjective(self.generator, self.identity, mask).eval()

    def fit(self, face: Tensor, age: float, config: LatentConfig, evaluations: int) -> tuple[Tensor, Tensor]:
        """Optimize one face's latent with torch's own L-BFGS; return it and its loss."""
        import torch

        weights = torch.tensor([config.identity_weight, config.pixel_weight, config.prior_weight])
        classes = torch.from_numpy(age_to_classes(np.array([age])))
        with torch.no_grad():
            z, embedding = self.encoder(face), self.identity(face)
        z.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [z],
            max_iter=evaluations,
            max_eval=evaluations,
            history_size=config.history,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.objective(z, classes, face, embedding, weights).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            return z.detach(), self.objective(z, classes, face, embedding, weights)[0]


def _choose_threads(networks: _Networks) -> None:
    """Give torch one thread or all, whichever is faster here now: on a busy machine all can be far slower."""
    import torch

    face = torch.zeros(1, 3, networks.size_px, networks.size_px)
    seconds = {}
    for threads in (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        networks.fit(face, 40.0, LatentConfig(), 2)  # the first call is slower
        start = perf_counter()
        networks.fit(face, 40.0, LatentConfig(), 3)
        seconds[threads] = perf_counter() - start
    torch.set_num_threads(min(seconds, key=lambda threads: seconds[threads]))


def generated_faces(model: str, count: int) -> FloatArray:
    """Return faces that a model's generator makes of seeded latents at ages from 15 to 75: float32 [F, 3, S, S]."""
    import torch

    path = find_model(model).generator
    random = np.random.default_rng(0)
    latents = random.standard_normal((count, read_header(path).dims["latent"])).astype(np.float32)
    classes = age_to_classes(np.linspace(15, 75, count, dtype=np.float32))
    with torch.no_grad():
        return generator_program(path).build()[0](torch.from_numpy(latents), torch.from_numpy(classes)).numpy()


def naive_fit(
    model: str, faces: FloatArray, ages: FloatArray, config: LatentConfig, evaluations: int
) -> tuple[FloatArray, float]:
    """Optimize faces one at a time in eager torch; return the losses, and milliseconds a face."""
    import torch

    networks = _Networks(model)
    _choose_threads(networks)
    pixels = torch.from_numpy(faces)
    start = perf_counter()
    losses = [float(networks.fit(pixels[i : i + 1], float(age), config, evaluations)[1]) for i, age in enumerate(ages)]
    return np.array(losses, np.float32), 1e3 * (perf_counter() - start) / len(faces)


def naive_evaluations(model: str, faces: FloatArray, ages: FloatArray, config: LatentConfig, loss: float) -> int:
    """Return how many evaluations a face `naive_fit` needs to get the mean loss down to `loss`, of `NAIVE_STEPS`."""
    for evaluations in NAIVE_STEPS:
        losses, _ = naive_fit(model, faces, ages, config, evaluations)
        if losses.mean() <= loss:
            return evaluations
    return NAIVE_STEPS[-1]


def naive_photos(model: str, photos: list[Path], folder: Path, request: AgeRequest, evaluations: int) -> dict:
    """Age photos one by one, and their faces one by one.

    Args:
        model: its checkpoints are used.
        photos: files.
        folder: of the outputs.
        request: whom to age.
        evaluations: of loss and gradient a face, as many as it needs for our loss.
    """
    from facenet_pytorch import MTCNN

    networks = _Networks(model)
    _choose_threads(networks)
    detector = MTCNN(keep_all=True)
    folder.mkdir(parents=True, exist_ok=True)
    faces = 0
    start = perf_counter()
    for i, photo in enumerate(photos):
        image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
        boxes, _, landmarks = detector.detect(image, landmarks=True)
        picture = np.asarray(image).astype(np.float32)
        for points in landmarks if boxes is not None else ():
            picture = _age_face(networks, picture, points, request, evaluations)
            faces += 1
        Image.fromarray(picture.round().clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=95)
    seconds = perf_counter() - start
    return {"photos": len(photos), "faces": faces, "seconds": seconds, "photos_per_second": len(photos) / seconds}


def _age_face(
    networks: _Networks, picture: FloatArray, points: FloatArray, request: AgeRequest, evaluations: int
) -> FloatArray:
    import torch

    side = networks.size_px
    (matrix,) = align_faces(np.asarray(points, np.float32)[None], side)
    crop = cv2.warpAffine(picture, matrix, (side, side), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE)
    face = torch.from_numpy(crop.transpose(2, 0, 1)[None] / 127.5 - 1)
    with torch.no_grad():
        source = float(networks.age(face)) if request.source_age is None else request.source_age
    z, _ = networks.fit(face, source, LatentConfig(), evaluations)
    target = request.target_ages(np.array([source], np.float32))
    with torch.no_grad():
        aged, reference = (
            networks.generator(z, torch.from_numpy(age_to_classes(ages))) for ages in (target, np.array([source]))
        )
    delta = (aged - reference)[0].permute(1, 2, 0).numpy() * 127.5 * face_mask(side)[..., None] * request.strength
    size = (picture.shape[1], picture.shape[0])
    return picture + cv2.warpAffine(delta, matrix, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
