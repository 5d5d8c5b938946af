"""Hair masks of All-Age-Faces' heads by a teacher that is not shipped: MediaPipe's hair segmentation.

    python -m train.space.hair_teacher --faces runs/space/faces --aaf aaf.tar --teacher hair_segmentation.tflite \
        --out runs/space/hair_teacher

Writes `heads.npz`: head crops uint8 [N, S, S, 3] and masks uint8 [N, S / 2, S / 2], 255 for hair.

Reference: Tkachenka et al.: Real-time Hair Segmentation and Recoloring on Mobile GPUs, 2019, arXiv:1907.06740.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import local

import click
import cv2
import numpy as np

from faceage.geometry import HEAD_TEMPLATE_5, similarity_to_template, template_5
from train.run import Script
from train.space.faces import AAF, Heads, pictures_of

log = logging.getLogger(__name__)

STORED_PX = 224
"""Side of the stored head crops: somewhat finer than the network's input, for augmentation."""
_TEACHER_PX = 512


class HairTeacher:
    """The teacher on one picture after another; one network a thread."""

    def __init__(self, model: Path) -> None:
        self._model, self._local = str(model), local()

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Return the probability of hair, float32 [512, 512], for a picture uint8 [H, W, 3] stretched to a square."""
        if not hasattr(self._local, "net"):
            self._local.net = cv2.dnn.readNetFromTFLite(self._model)
        x = np.zeros((1, 4, _TEACHER_PX, _TEACHER_PX), np.float32)
        x[0, :3] = cv2.resize(picture, (_TEACHER_PX, _TEACHER_PX)).transpose(2, 0, 1) / 255.0
        self._local.net.setInput(x)
        logits = self._local.net.forward()[0]
        return 1 / (1 + np.exp(logits[0] - logits[1]))


def head_matrix(landmarks: np.ndarray, size_px: int) -> np.ndarray:
    """Return the map [2, 3] from picture to head crop."""
    return similarity_to_template(landmarks[None].astype(np.float32), template_5(size_px, HEAD_TEMPLATE_5))[0]


def warp_head(picture: np.ndarray, matrix: np.ndarray, size_px: int, border: int = cv2.BORDER_REPLICATE) -> np.ndarray:
    """Return the head crop of a picture, area-filtered."""
    scale = float(np.hypot(matrix[0, 0], matrix[0, 1]))
    if scale < 0.7:  # reduce first: warpAffine samples points
        small = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        fx, fy = small.shape[1] / picture.shape[1], small.shape[0] / picture.shape[0]
        matrix = matrix @ np.array([[1 / fx, 0, 0.5 / fx - 0.5], [0, 1 / fy, 0.5 / fy - 0.5], [0, 0, 1]])
        picture = small
    return cv2.warpAffine(picture, matrix, (size_px, size_px), flags=cv2.INTER_LINEAR, borderMode=border)


@click.command(cls=Script)
@click.option("--faces", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--aaf", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--teacher", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(faces: Path, aaf: Path, teacher: Path, out: Path) -> None:
    """Run the teacher once."""
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8.0f ms  %(message)s")
    cv2.setNumThreads(1)
    heads = Heads.load(faces)
    heads = heads.rows(heads.dataset == AAF)
    rows = {name: i for i, name in enumerate(heads.names)}
    hair = HairTeacher(teacher)

    def work(item: tuple[str, np.ndarray]) -> tuple[int, np.ndarray, np.ndarray]:
        name, picture = item
        i = rows[name]
        matrix = head_matrix(heads.landmarks[i], STORED_PX)
        probability = cv2.resize(hair(picture), picture.shape[1::-1])
        mask = warp_head(probability, matrix, STORED_PX, cv2.BORDER_REPLICATE)
        mask = cv2.resize(mask, (STORED_PX // 2, STORED_PX // 2), interpolation=cv2.INTER_AREA)
        return i, warp_head(picture, matrix, STORED_PX), np.rint(255 * mask.clip(0, 1)).astype(np.uint8)

    crops = np.zeros((len(heads), STORED_PX, STORED_PX, 3), np.uint8)
    masks = np.zeros((len(heads), STORED_PX // 2, STORED_PX // 2), np.uint8)
    with ThreadPoolExecutor(2) as pool:
        for done, (i, crop, mask) in enumerate(pool.map(work, pictures_of([aaf], set(rows))), 1):
            crops[i], masks[i] = crop, mask
            if done % 500 == 0:
                log.info("%d of %d", done, len(heads))
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "heads.npz", crops=crops, masks=masks, names=heads.names, validation=heads.validation)


if __name__ == "__main__":
    main()
