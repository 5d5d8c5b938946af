"""What a plain `pip install faceage` leaves out, and which extra brings it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Extra:
    """An optional part of the installation: `pip install 'faceage[name]'`."""

    modules: tuple[str, ...]
    """Modules that are there once it is installed."""
    commands: str
    """What needs it."""


EXTRAS = {
    "torch": Extra(
        ("torch", "torchvision", "facenet_pytorch", "onnx", "onnxscript"),
        "--device cuda; --backend aotinductor, torch; models import, fetch; bench images, engines, latent",
    ),
    "tensorrt": Extra(("tensorrt_rtx", "onnx"), "compile --target portable, sm_75, sm_86, sm_89, sm_120"),
    "ray": Extra(("ray",), "video, images: --ray"),
    "train": Extra(("torch", "scipy", "matplotlib"), "python -m train, in a clone of the repository"),
}
"""By name, as in pyproject.toml. Every other command needs none."""


def missing(extra: str, what: str) -> str | None:
    """Return that `what` needs an extra, and the command that installs it, or None if it is installed."""
    absent = [name for name in EXTRAS[extra].modules if find_spec(name) is None]
    return f"{what} needs {', '.join(absent)}; run: pip install 'faceage[{extra}]'" if absent else None
