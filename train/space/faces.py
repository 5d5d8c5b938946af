"""The pictures that the space model is made of: UTKFace's faces and All-Age-Faces' whole heads, with dense meshes.

    python -m train.space.faces --utkface utkface.tar --aaf aaf.tar --mesh face_landmark.tflite --out runs/space/faces

Writes `faces.npz`: one row a face with its labels, five landmarks and 468 mesh points in pixels of its picture. The
mesh teacher is MediaPipe's face mesh (Kartynnik et al. 2019, arXiv:1907.06724), run by OpenVINO; it is not shipped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import cv2
import numpy as np

from faceage.geometry import TEMPLATE_5, apply_affine, invert_affine, similarity_to_template
from train.data import AAF_LAST_WOMAN, AAF_NAME, UTKFACE_NAME, find_landmarks, is_validation, read_archive
from train.run import Script

log = logging.getLogger(__name__)

UTKFACE, AAF = 0, 1
MESH_PX = 192
_MESH_SIDE = 1.5
"""Side of the mesh network's crop, in sides of the aligned crop of the product."""
_BATCH = 16


@dataclass(frozen=True)
class Heads:
    """Labelled pictures of one face each, with its mesh."""

    names: np.ndarray
    dataset: np.ndarray
    """int64 [N], `UTKFACE` or `AAF`."""
    ages: np.ndarray
    """float32 [N], years."""
    genders: np.ndarray
    """int64 [N], 0 male, 1 female: the datasets' own labels, used to choose and to measure, never by the product."""
    races: np.ndarray
    """int64 [N], UTKFace's label; 2 (Asian) for All-Age-Faces."""
    landmarks: np.ndarray
    """float32 [N, 5, 2], picture pixels."""
    mesh: np.ndarray
    """float32 [N, 468, 3], picture pixels; z in the same unit, smaller is nearer."""
    presence: np.ndarray
    """float32 [N], the mesh network's logit that there is a face."""
    validation: np.ndarray
    """bool [N], never trained on."""

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, which: np.ndarray) -> Heads:
        """Return the faces that a mask or an index array selects."""
        return Heads(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    @classmethod
    def load(cls, folder: Path) -> Heads:
        """Read `faces.npz`."""
        with np.load(folder / "faces.npz", allow_pickle=False) as data:
            return cls(*(data[name] for name in cls.__dataclass_fields__))


def read_picture(data: bytes) -> np.ndarray | None:
    """Decode JPEG bytes: uint8 [H, W, 3], RGB; None for damaged ones."""
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return None if picture is None else cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def pictures_of(archives: list[Path], names: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, picture) of those pictures of the archives whose names are wanted."""
    for archive in archives:
        for name, data in read_archive(archive):
            if name in names and (picture := read_picture(data)) is not None:
                yield name, picture


class MeshTeacher:
    """MediaPipe's face mesh: 468 points of each face, from a first guess by five landmarks, refined once."""

    def __init__(self, model: Path) -> None:
        import openvino as ov

        core = ov.Core()
        network = core.read_model(model)
        network.reshape([_BATCH, MESH_PX, MESH_PX, 3])
        self._network = core.compile_model(network, "CPU", {"INFERENCE_NUM_THREADS": 2})

    def __call__(self, pictures: list[np.ndarray], landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mesh float32 [N, 468, 3] in picture pixels, and presence float32 [N]."""
        template = ((TEMPLATE_5 - 0.5) / _MESH_SIDE + 0.5) * MESH_PX - 0.5
        matrices = similarity_to_template(landmarks.astype(np.float32), template.astype(np.float32))
        mesh, _ = self._run(pictures, matrices)
        # As MediaPipe tracks: the crop of the second pass is placed by the mesh of the first.
        matrices = np.stack([_crop_of(points) for points in mesh])
        return self._run(pictures, matrices)

    def _run(self, pictures: list[np.ndarray], matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        meshes, presences = [], []
        for start in range(0, len(pictures), _BATCH):
            part = slice(start, start + _BATCH)
            crops = np.zeros((_BATCH, MESH_PX, MESH_PX, 3), np.float32)
            for row, (picture, matrix) in enumerate(zip(pictures[part], matrices[part], strict=True)):
                flags, border = cv2.INTER_AREA, cv2.BORDER_REPLICATE
                crops[row] = cv2.warpAffine(picture, matrix, (MESH_PX, MESH_PX), flags=flags, borderMode=border) / 255.0
            result = self._network(crops)
            count = len(pictures[part])
            points = result[0].reshape(_BATCH, 468, 3)[:count].copy()
            back = invert_affine(matrices[part])
            scale = np.hypot(back[:, 0, 0], back[:, 1, 0])[:, None]
            flat = apply_affine(back, points[..., :2])
            meshes.append(np.concatenate([flat, (points[..., 2] * scale)[..., None]], -1))
            presences.append(result[1].reshape(_BATCH)[:count].copy())
        return np.concatenate(meshes).astype(np.float32), np.concatenate(presences)


def _crop_of(mesh: np.ndarray) -> np.ndarray:
    """Return the map from the picture to the mesh network's crop: eyes level, 1.5 times the mesh's larger side."""
    right, left = mesh[33, :2], mesh[263, :2]  # outer corners of the eyes, left to right in the picture
    angle = np.arctan2(left[1] - right[1], left[0] - right[0])
    cos, sin = np.cos(angle), np.sin(angle)
    turned = mesh[:, :2] @ np.array([[cos, -sin], [sin, cos]])
    low, high = turned.min(0), turned.max(0)
    scale = MESH_PX / (1.5 * (high - low).max())
    linear = scale * np.array([[cos, sin], [-sin, cos]])
    offset = (MESH_PX - 1) / 2 - scale * (low + high) / 2
    return np.column_stack([linear, offset]).astype(np.float32)


def _read_utkface(archive: Path) -> tuple[list[tuple], list[np.ndarray], np.ndarray]:
    rows, pictures = [], []
    for name, data in read_archive(archive):
        match = UTKFACE_NAME.fullmatch(name)
        picture = read_picture(data) if match else None
        if match and picture is not None:
            rows.append((name, UTKFACE, int(match[1]), int(match[2]), int(match[3])))
            pictures.append(picture)
    landmarks, scores = find_landmarks(pictures)
    kept = np.flatnonzero(scores >= 0.9)
    return [rows[i] for i in kept], [pictures[i] for i in kept], landmarks[kept]


def _read_aaf(archive: Path) -> tuple[list[tuple], list[np.ndarray], np.ndarray]:
    from faceage.detect import DetectConfig, load_detector
    from faceage.engines.registry import DEFAULT_RUNTIME
    from faceage.engines.store import EngineStore
    from faceage.types import RGB, Frame

    detector = load_detector(EngineStore(), DetectConfig(min_face_px=60), replace(DEFAULT_RUNTIME, threads=2))
    rows, pictures, landmarks = [], [], []
    for name, data in read_archive(archive):
        match = AAF_NAME.fullmatch(name)
        picture = read_picture(data) if match else None
        if not match or picture is None:
            continue
        faces = detector.detect([Frame(planes=(picture,), pixel_format="rgb24", color=RGB)])
        faces = faces[faces.scores >= 0.9]
        if len(faces):
            largest = np.argmax(faces.boxes[:, 3] - faces.boxes[:, 1])
            rows.append((name, AAF, int(match[2]), int(int(match[1]) <= AAF_LAST_WOMAN), 2))
            pictures.append(picture)
            landmarks.append(faces.landmarks[largest])
    return rows, pictures, np.stack(landmarks)


@click.command(cls=Script)
@click.option("--utkface", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--aaf", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--mesh", type=click.Path(exists=True, path_type=Path), required=True, help="face_landmark.tflite")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(utkface: Path, aaf: Path, mesh: Path, out: Path) -> None:
    """Find the mesh of every face."""
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8.0f ms  %(message)s")
    teacher = MeshTeacher(mesh)
    rows, points, meshes, presences = [], [], [], []
    for read, archive in ((_read_utkface, utkface), (_read_aaf, aaf)):
        some, pictures, landmarks = read(archive)
        log.info("%s: %d faces", archive.name, len(some))
        mesh_points, presence = teacher(pictures, landmarks)
        rows += some
        points.append(landmarks)
        meshes.append(mesh_points)
        presences.append(presence)
        log.info("%s: meshes found", archive.name)
    names, dataset, ages, genders, races = zip(*rows, strict=True)
    heads = Heads(
        names=np.array(names),
        dataset=np.array(dataset),
        ages=np.array(ages, np.float32),
        genders=np.array(genders),
        races=np.array(races),
        landmarks=np.concatenate(points).astype(np.float32),
        mesh=np.concatenate(meshes),
        presence=np.concatenate(presences),
        validation=np.array([is_validation(name) for name in names]),
    )
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "faces.npz", **{name: getattr(heads, name) for name in Heads.__dataclass_fields__})
    log.info("%d faces, %d of them for validation", len(heads), heads.validation.sum())


if __name__ == "__main__":
    main()
