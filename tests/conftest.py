"""What many tests share: a model of tiny random networks, its engines, and a photo and a clip with a face.

Also makes the modules beside the tests (`clips`) importable: importlib mode leaves the folder off the path.
"""

import dataclasses
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

# Tests run in a process a core, and threads of libraries that wait for one another busily would take it from others.
for _library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")

if not os.path.exists("/dev/nvidiactl"):
    # Triton asks for it when it is imported, and other libraries import it too. Only kernels of ours are run here.
    os.environ.setdefault("TRITON_INTERPRET", "1")

FACE_PX = 256
"""Side of the photo and the clip."""


@pytest.fixture(scope="session", autouse=True)
def _networks_are_exported_once(tmp_path_factory):
    """Exporting a network takes torch seconds: what is imported again, in whatever process of the tests, is copied."""
    from faceage.engines import export
    from faceage.engines.base import fingerprint

    mine = tmp_path_factory.getbasetemp()
    shared = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "exported"
    shared.mkdir(exist_ok=True)
    write_graph = export.write_graph

    def write_once(program):
        kept = shared / fingerprint(program.graph.name, repr(program.inputs), *program.checkpoints)
        with kept.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.exists():
                write_graph(program)
                kept.mkdir()
                for path in (program.graph, program.sidecar):
                    shutil.copyfile(path, kept / path.name)
            for path in (program.graph, program.sidecar):
                shutil.copyfile(kept / path.name, path)
        return json.loads(program.sidecar.read_text())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "write_graph", write_once)
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Checkpoints of small random networks, by architecture."""
    import torch

    from faceage.checkpoint import Header, save
    from faceage.networks.age_cgan import AgeCGANDims, Encoder, Generator
    from faceage.networks.regressors import AgeEstimator, IdentityNet, TrunkDims

    torch.manual_seed(0)
    dims = AgeCGANDims(generator_channels=(24, 16, 12, 8, 8), encoder_channels=(8, 8, 12, 16), encoder_hidden=64)
    small = {"widths": (8, 8, 12, 16), "blocks": (1, 1, 1, 1)}
    age, identity = TrunkDims(**small, outputs=101), TrunkDims(**small, outputs=128)
    networks = {
        "age-cgan-generator": (Generator(dims), dims),
        "age-cgan-encoder": (Encoder(dims), dims),
        "age-estimator": (AgeEstimator(age), age),
        "identity": (IdentityNet(identity), identity),
    }
    with torch.no_grad():
        generator = networks["age-cgan-generator"][0]
        generator.to_rgb.weight.mul_(40)  # so that ages differ visibly
        generator.dense.weight[:, dims.latent :].mul_(20)
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {}
    for arch, (network, its_dims) in networks.items():
        paths[arch] = folder / f"{arch}.safetensors"
        header = Header(arch=arch, dims=dataclasses.asdict(its_dims), stage="test", images_seen=0)
        save(paths[arch], network.state_dict(), header)
    return paths


@pytest.fixture(scope="session")
def tiny_model(checkpoints, tmp_path_factory):
    """The name of a model made of `checkpoints`, in a cache folder that all tests of the session share."""
    from faceage.models import import_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACEAGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        import_model("tiny", list(checkpoints.values()))
        yield "tiny"


@pytest.fixture(scope="session")
def facegan_checkpoint(tmp_path_factory):
    """The checkpoint of a small random FaceGAN whose change can be seen: an untrained one changes nothing."""
    import torch

    from faceage.checkpoint import Header, save
    from faceage.networks.facegan import FaceGANDims, UNet

    torch.manual_seed(0)
    dims = FaceGANDims(widths=(8, 8, 12, 12, 16), head=4, ages=8)
    network = UNet(dims)
    with torch.no_grad():
        network.to_luma.weight.normal_(std=0.3)
    path = tmp_path_factory.mktemp("facegan") / "facegan.safetensors"
    save(path, network.state_dict(), Header(arch="facegan", dims=dataclasses.asdict(dims), stage="test", images_seen=0))
    return path


@pytest.fixture(scope="session")
def tiny_facegan(tiny_model, checkpoints, facegan_checkpoint):
    """The name of a FaceGAN with the readers of `tiny_model`, in its cache folder."""
    from faceage.models import import_model

    import_model("tiny-facegan", [facegan_checkpoint, checkpoints["age-estimator"], checkpoints["identity"]])
    return "tiny-facegan"


@pytest.fixture(scope="session")
def facegan(tiny_facegan):
    """The loaded networks of `tiny_facegan`."""
    from faceage.pipeline.request import load_networks

    return load_networks(model=tiny_facegan)


@pytest.fixture(scope="session")
def networks(tiny_model):
    """The loaded networks of `tiny_model`; their engines are built once a session."""
    from faceage.pipeline.request import load_networks

    return load_networks(model=tiny_model)


@pytest.fixture(scope="session")
def bundled(tiny_model):
    """The loaded networks of the bundled Age-cGAN; their engines are built once a session."""
    from faceage.pipeline.request import load_networks

    return load_networks(model="age-cgan")


@pytest.fixture(scope="session")
def face_picture():
    """An upright photo of one face: uint8 [256, 256, 3], RGB."""
    skimage_data = pytest.importorskip("skimage.data")
    return skimage_data.astronaut()[:FACE_PX, 96 : 96 + FACE_PX].copy()


@pytest.fixture(scope="session")
def face_photo(face_picture, tmp_path_factory):
    """`face_picture` as a PNG file."""
    from PIL import Image

    path = tmp_path_factory.mktemp("photo") / "face.png"
    Image.fromarray(face_picture).save(path)
    return path


@pytest.fixture(scope="session")
def face_clip(tmp_path_factory):
    """Two seconds of a slowly moving camera on one face, 256x256 at 25 frames a second, with a tone and a comment."""
    import av
    from clips import make_clip, regular_pts

    skimage_data = pytest.importorskip("skimage.data")
    photo = skimage_data.astronaut()

    def draw(index):
        x, y = 80 + index // 2, index // 4
        picture = photo[y : y + FACE_PX, x : x + FACE_PX].copy()
        return av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")

    def configure(output, stream):
        output.metadata["comment"] = "shot on a film set"

    path = tmp_path_factory.mktemp("clip") / "face.mp4"
    return make_clip(
        path,
        pts=regular_pts(50),
        size=(FACE_PX, FACE_PX),
        audio="aac",
        draw=draw,
        configure=configure,
        options={"preset": "veryfast", "crf": "20"},
        container_options={"movflags": "faststart"},
    )


@pytest.fixture(scope="session")
def long_clip(tmp_path_factory, face_picture):
    """A face that wanders, for two segments of about 96 frames, with sound."""
    import av
    import numpy as np
    from clips import make_clip, regular_pts

    def draw(index):
        picture = np.roll(face_picture, ((index + 2) // 4) % 24, axis=1)
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(format="yuv420p")

    return make_clip(
        tmp_path_factory.mktemp("long") / "long.mp4", pts=regular_pts(228), size=(FACE_PX, FACE_PX), draw=draw,
        audio="aac", options={"preset": "ultrafast", "bf": "2", "g": "50"},
    )  # fmt: skip


@pytest.fixture(scope="session")
def long_plan(networks, long_clip):
    """The plan of `long_clip`, in two segments."""
    from faceage.media.video import VideoReader
    from faceage.pipeline.scan import scan

    with VideoReader(long_clip) as reader:
        return scan(networks, reader, segment_frames=96)
