"""The baselines of the measurements: the same networks, the way a first script would run them.

facenet-pytorch's MTCNN photo by photo, eager torch face by face, autograd for the latent, and the whole picture warped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageOps

from faceage.agers.age_cgan import encoder_program
from faceage.agers.base import ModelFiles, read_view
from faceage.agers.facegan import unet_program
from faceage.agers.latent import LatentConfig
from faceage.agers.programs import reader_program
from faceage.ages import age_to_classes
from faceage.align import align_faces, choose_size
from faceage.checkpoint import load, read_header
from faceage.engines.examples import example_faces
from faceage.errors import UnsupportedError
from faceage.geometry import apply_affine, face_mask, skin_masks, template_5
from faceage.models import find_model
from faceage.pipeline.request import AgeRequest, resolve_ages
from faceage.types import FloatArray

if TYPE_CHECKING:
    from torch import Tensor, nn


NAIVE_STEPS = (*range(2, 20), *range(20, 65, 4))
"""Evaluations a face that the baseline may take: no coarser, or it would be made to do more than it needs."""


PORTRAIT_PX = 128
"""Side of the bundled portrait."""

LBFGS_HISTORY = 8
"""Steps that torch's L-BFGS keeps. It searches along each: without its line search it needed more evaluations here."""


def _generator(checkpoint: Path) -> nn.Module:
    """Return a generator as it was trained, without what is rewritten for speed."""
    from faceage.networks.age_cgan import AgeCGANDims, Generator

    header, weights = load(checkpoint, "age-cgan-generator")
    generator = Generator(AgeCGANDims(**header.dims)).eval().requires_grad_(False)
    generator.load_state_dict(weights)
    return generator


class _AgeCGAN:
    """The networks of an Age-cGAN in eager torch."""

    def __init__(self, files: ModelFiles, evaluations: int = 0) -> None:
        """Take `evaluations` of loss and gradient a face in `delta`."""
        import torch

        from faceage.networks.latent import LatentObjective

        self.generator = _generator(files.generator)
        self.encoder = encoder_program(files.paths["encoder"]).network(True)
        self.identity = reader_program(files.identity).network(True)
        size_px = read_header(files.generator).dims["size_px"]
        self.view = read_view(files.generator, (size_px,))
        mask = torch.tensor(face_mask(size_px))
        self.objective = LatentObjective(self.generator, self.identity, mask).eval()
        self._evaluations = evaluations

    def delta(self, face: Tensor, landmarks: FloatArray, source: float, target: float) -> FloatArray:
        """Return the change of one face [1, 3, S, S]: float32 [3, S, S]."""
        import torch

        z = self.fit(face, source, LatentConfig(), self._evaluations)
        with torch.no_grad():
            aged, reference = (
                self.generator(z, torch.from_numpy(age_to_classes(np.array([age])))) for age in (target, source)
            )
        return (aged - reference)[0].numpy()

    def fit(self, face: Tensor, age: float, config: LatentConfig, evaluations: int) -> Tensor:
        """Optimize one face's latent with torch's own L-BFGS; return it."""
        import torch

        with torch.no_grad():
            z = self.encoder(face)
        loss_of = self._losses(face, age, config)
        z.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [z],
            max_iter=evaluations,
            max_eval=evaluations,
            history_size=LBFGS_HISTORY,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(z)
            loss.backward()
            return loss

        optimizer.step(closure)
        return z.detach()

    def loss(self, z: Tensor, face: Tensor, age: float, config: LatentConfig) -> float:
        """Return the loss of one face's latent."""
        import torch

        with torch.no_grad():
            return float(self._losses(face, age, config)(z))

    def _losses(self, face: Tensor, age: float, config: LatentConfig) -> Callable[[Tensor], Tensor]:
        import torch

        weights = torch.tensor([config.identity_weight, config.pixel_weight, config.prior_weight])
        classes = torch.from_numpy(age_to_classes(np.array([age])))
        with torch.no_grad():
            embedding = self.identity(face)
        return lambda z: self.objective(z, classes, face, embedding, weights).sum()


class _FaceGAN:
    """The U-Net of a FaceGAN in eager torch."""

    def __init__(self, files: ModelFiles, evaluations: int = 0) -> None:
        """Take no evaluations: it optimizes nothing."""
        self.view = read_view(files.generator, read_header(files.generator).dims["sizes_px"])
        # It is the same at every size.
        self.unet: nn.Module = unet_program(files.generator, self.view.sizes_px[0]).network(True)

    def delta(self, face: Tensor, landmarks: FloatArray, source: float, target: float) -> FloatArray:
        """Return the change of one face [1, 3, S, S] with its landmarks [5, 2]: float32 [3, S, S]."""
        import torch

        with torch.no_grad():
            change = self.unet(face, torch.tensor([source]), torch.tensor([target]))
        return (change.numpy() * skin_masks(landmarks[None], face.shape[-1]))[0]


_BASELINES: dict[str, type[_AgeCGAN | _FaceGAN]] = {"age-cgan": _AgeCGAN, "facegan": _FaceGAN}
"""By the model's architecture."""


def _choose_threads(work: Callable[[], object]) -> None:
    """Give torch one thread or all, whichever does some work faster now: on a busy machine all can be far slower."""
    import torch

    seconds = {}
    for threads in (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        work()  # the first call is slower
        start = perf_counter()
        work()
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
        return _generator(path)(torch.from_numpy(latents), torch.from_numpy(classes)).numpy()


def generated_photos(folder: Path, count: int, megapixels: float) -> list[Path]:
    """Write photos of a camera's size and grain that show the bundled portrait twice, a third and a sixth as high.

    Returns:
        The files: 4:3, baseline JPEG, 4:2:0, quality 92.
    """
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    width = height * 4 // 3
    portraits = ((example_faces(count, PORTRAIT_PX) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    photos = [folder / f"{i}.jpg" for i in range(count)]
    for seed, (portrait, photo) in enumerate(zip(portraits, photos, strict=True)):
        random = np.random.default_rng(seed)
        picture = cv2.resize(cv2.GaussianBlur(portrait, (0, 0), PORTRAIT_PX / 16), (width, height))
        for left, side in ((0, height // 3), (width // 2, height // 6)):
            y, x = random.integers(0, (height - side, width // 2 - side))
            face = cv2.resize(portrait, (side, side), interpolation=cv2.INTER_CUBIC)
            picture[y : y + side, left + x : left + x + side] = face
        grain = random.normal(0, 3, (height, width, 1)).astype(np.float32)
        noisy = (picture + grain).round().clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(photo, quality=92, subsampling="4:2:0")
    return photos


def naive_fit(
    model: str, faces: FloatArray, ages: FloatArray, config: LatentConfig, evaluations: int
) -> tuple[FloatArray, float]:
    """Optimize faces one at a time in eager torch; return the losses, and milliseconds a face."""
    import torch

    networks = _AgeCGAN(find_model(model))
    pixels = torch.from_numpy(faces)
    _choose_threads(lambda: networks.fit(pixels[:1], 40.0, config, 3))
    parts = [(pixels[i : i + 1], float(age)) for i, age in enumerate(ages)]
    start = perf_counter()
    latents = [networks.fit(face, age, config, evaluations) for face, age in parts]
    milliseconds = 1e3 * (perf_counter() - start) / len(faces)
    losses = [networks.loss(z, face, age, config) for z, (face, age) in zip(latents, parts, strict=True)]
    return np.array(losses, np.float32), milliseconds


def naive_evaluations(model: str, faces: FloatArray, ages: FloatArray, config: LatentConfig, loss: float) -> int:
    """Return how many evaluations a face `naive_fit` needs to get the mean loss down to `loss`, of `NAIVE_STEPS`."""
    for evaluations in NAIVE_STEPS:
        losses, _ = naive_fit(model, faces, ages, config, evaluations)
        if losses.mean() <= loss:
            return evaluations
    return NAIVE_STEPS[-1]


def naive_loop(model: str, folder: Path, request: AgeRequest, evaluations: int) -> Callable[[list[Path]], int]:
    """Return a function that ages photos one by one, and their faces one by one; it returns how many faces.

    Args:
        model: its checkpoints are used.
        folder: of the outputs.
        request: whom to age.
        evaluations: of loss and gradient a face, as many as it needs for our loss; of Age-cGAN only.
    """
    import torch
    from facenet_pytorch import MTCNN

    files = find_model(model)
    if files.architecture not in _BASELINES:
        raise UnsupportedError(f"model {model} has no naive loop to be measured against; use {' or '.join(_BASELINES)}")
    ager = _BASELINES[files.architecture](files, evaluations)
    age_reader, age_px = reader_program(files.age).network(True), read_header(files.age).dims["size_px"]
    size = ager.view.sizes_px[0]
    _choose_threads(lambda: ager.delta(torch.zeros(1, 3, size, size), template_5(size), 40.0, 70.0))
    detector = MTCNN(keep_all=True)

    def age_face(picture: FloatArray, points: FloatArray) -> FloatArray:
        estimated = np.zeros(1, np.float32)
        if request.source_age is None:
            with torch.no_grad():
                estimated = age_reader(_crop(picture, points, age_px)).numpy()
        source, target = (float(age[0]) for age in resolve_ages(estimated, request))
        side = choose_size(points[None], ager.view)
        (matrix,) = align_faces(points[None], side)
        delta = ager.delta(_crop(picture, points, side), apply_affine(matrix, points), source, target)
        delta = delta.transpose(1, 2, 0) * 127.5 * face_mask(side)[..., None] * request.strength
        size = (picture.shape[1], picture.shape[0])
        return picture + cv2.warpAffine(delta, matrix, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)

    def age_photos(photos: list[Path]) -> int:
        faces = 0
        for i, photo in enumerate(photos):
            image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
            boxes, _, landmarks = detector.detect(image, landmarks=True)
            picture = np.asarray(image).astype(np.float32)
            for points in landmarks if boxes is not None else ():
                picture = age_face(picture, np.asarray(points, np.float32))
                faces += 1
            Image.fromarray(picture.round().clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=95)
        return faces

    return age_photos


def _crop(picture: FloatArray, points: FloatArray, side: int) -> Tensor:
    """Return one aligned face of a picture [H, W, 3]: float32 [1, 3, side, side]."""
    import torch

    (matrix,) = align_faces(points[None], side)
    crop = cv2.warpAffine(picture, matrix, (side, side), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE)
    return torch.from_numpy(crop.transpose(2, 0, 1)[None] / 127.5 - 1)
