"""FaceNet, downloaded on request and made into a safetensors checkpoint. Nothing else is ever downloaded.

Reference: InceptionResnetV1 trained on VGGFace2, from facenet-pytorch (MIT licence), a port of David Sandberg's FaceNet
20180402-114759; Schroff, Kalenichenko, Philbin: FaceNet, CVPR 2015, arXiv:1503.03832.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from faceage.agers.programs import reader_program
from faceage.checkpoint import Header, read_header, save
from faceage.errors import CheckpointError, EngineError
from faceage.extras import missing
from faceage.models import FACENET_ARCH, facenet_file, find_model

FACENET_URL = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/20180402-114759-vggface2.pt"
FACENET_SHA256 = "281cebca8662831adb987a874bdcb36e73f5b1c6dc5ee5878f305e985625d99b"
FACENET_BYTES = 111_898_327
TIMEOUT_S = 30
_CHUNK_BYTES = 1 << 18

Progress = Callable[[int, int], None]
"""(bytes so far, bytes in all)."""


def fetch_facenet(progress: Progress | None = None) -> Path:
    """Download FaceNet, check it, and store it as a checkpoint with its graph; it appears when it is complete.

    Args:
        progress: called as the bytes arrive.

    Raises:
        CheckpointError: if the download fails or is not the file that was expected.
        EngineError: if torch is not installed, which converts it.
    """
    if reason := missing("torch", "converting FaceNet"):
        raise EngineError(reason)
    from faceage.engines.export import write_graph

    target = facenet_file()
    download = target.with_name(f".facenet.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _download(download, progress or (lambda *_: None))
            _convert(download, target)
            # FaceNet gets the crops that the bundled identity network would.
            write_graph(reader_program(target, read_header(find_model().identity).dims["size_px"]))
        finally:
            download.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"FaceNet cannot be stored in {target.parent} ({error.strerror or error}); "
            "set FACEAGE_CACHE to a folder that can be written"
        ) from error
    return target


def _download(path: Path, progress: Progress) -> None:
    digest = hashlib.sha256()
    done = 0
    try:
        with urllib.request.urlopen(FACENET_URL, timeout=TIMEOUT_S) as response, path.open("wb") as file:
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                progress(done, FACENET_BYTES)
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise CheckpointError(
            f"{FACENET_URL} cannot be downloaded ({getattr(error, 'reason', None) or error}); "
            "check the network (proxies are taken from HTTPS_PROXY) and run `faceage models fetch facenet` again"
        ) from error
    if digest.hexdigest() != FACENET_SHA256:
        raise CheckpointError(
            f"{FACENET_URL} gave {done:,} bytes with SHA-256 {digest.hexdigest()}, expected {FACENET_BYTES:,} with "
            f"{FACENET_SHA256}; the download was cut short or changed on the way, fetch it again"
        )


def _convert(download: Path, target: Path) -> None:
    """Read the weights without unpickling objects, and write them without the classifier of VGGFace2's people."""
    import torch

    try:
        weights = torch.load(download, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{download} cannot be read by this torch ({error}); report this") from error
    weights = {name: value for name, value in weights.items() if not name.startswith("logits.")}
    header = Header(
        arch=FACENET_ARCH,
        dims={"size_px": 160, "outputs": 512},
        stage="facenet-pytorch 20180402-114759-vggface2",
        images_seen=0,
        input_spec="RGB in [-1, 1], NCHW, 160x160",
        dataset={"name": "VGGFace2"},
        parents={"facenet-pytorch": FACENET_SHA256},
    )
    save(target, weights, header)
