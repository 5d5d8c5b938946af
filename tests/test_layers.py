"""The layers of design.md, section 4: imports point down, and what must start fast imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "types": 0, "errors": 0, "cache": 0, "extras": 0,
    "kernels": 1,
    "networks": 2, "checkpoint": 2, "geometry": 2, "ages": 2,
    "engines": 3,
    "media": 4, "detect": 4, "follow": 4, "cuts": 4, "smooth": 4, "track": 4, "align": 4, "blend": 4,
    "agers": 4, "models": 4,
    "pipeline": 5,
    "bench": 6,
    "cli": 7,
}  # fmt: skip
"""Module or subpackage of faceage -> its layer."""
FAMILIES = [
    {"types", "errors", "cache", "extras"},
    {"agers", "models"},
    {"detect", "track", "follow", "cuts", "smooth"},
]
"""Modules of one layer that may import one another."""
CROSSING = {
    ("networks", "engines"): "mtcnn and pnet describe their programs beside the networks",
    ("networks", "checkpoint"): "mtcnn's weights are bundled, and no model's",
    ("networks", "geometry"): "FaceGAN takes the mean of its change inside the blend mask",
}
"""Imports that do not point down, and why."""
TRAIN_MAY_USE = {name for name, layer in LAYERS.items() if layer <= 2} | {
    "align",
    "media.image",
    "media.still",
    "agers.latent",
    "agers.age_cgan",
    "agers.facegan",
    "agers.canonical",
    "detect",
    "agers.base",
    "agers.programs",
    "agers.registry",
    "engines.base",
    "engines.export",
    "engines.store",
    "engines.registry",
}
HEAVY = ("torch", "cv2", "av", "onnxruntime", "openvino", "numpy", "rich")


def sources():
    for folder, name in (("faceage", "faceage"), ("kernels", "faceage.kernels"), ("train", "train")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([name, *(part for part in parts if part != "__init__")]), path


def imports(path):
    """Every module that a file imports, wherever in it; type-checking imports do not run."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def home(name):
    """The part of faceage that a dotted name belongs to, "" for faceage itself."""
    part = name.split(".")[1] if "." in name else ""
    return part if part in LAYERS else ""


@pytest.mark.parametrize(("module", "path"), list(sources()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_down(module, path):
    for name in imports(path):
        top = name.split(".")[0]
        assert top != "train" or module.startswith("train"), f"{module} imports {name}"
        if top != "faceage" or not home(name):
            continue
        if module.startswith("train.evaluate.") or module == "train.space.pairs":
            continue  # they measure the product, or learn from it, by its own path
        if module.startswith("train"):
            allowed = home(name) in TRAIN_MAY_USE or ".".join(name.split(".")[1:3]) in TRAIN_MAY_USE
            assert allowed, f"{module} imports {name}"
            continue
        here, there = home(module), home(name)
        if not here or here == there or (here, there) in CROSSING:
            continue
        beside = any(here in family and there in family for family in FAMILIES)
        assert LAYERS[there] < LAYERS[here] or beside, f"{module} imports {name}"


def test_every_module_has_a_layer():
    for module, _ in sources():
        if module.startswith("faceage."):
            assert home(module), f"{module} is in no layer of design.md"


@pytest.mark.parametrize(
    "code",
    [
        "import faceage",
        "from faceage.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from faceage.cli import main\ntry: main(['--version'])\nexcept SystemExit: pass",
    ],
    ids=["import", "help", "version"],
)
def test_starts_without_anything_heavy(code):
    check = f"{code}\nimport sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_run_with_built_engines_needs_no_torch():
    code = "import faceage.cli.video, faceage.cli.images, faceage.cli.sheet, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_photos_start_without_what_other_runs_need():
    names = ("multiprocessing", "socket", "html", "tempfile", "numpy.ma", "numpy.random")
    code = f"import faceage.cli.images, faceage.pipeline.folder, sys; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"]
