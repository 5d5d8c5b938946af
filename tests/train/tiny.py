"""Makes the training scripts small. As a script it trains one: `python tiny.py VALIDATION_FILE gan --data ...`."""

import importlib
import os
import sys
from functools import partial
from pathlib import Path

SMALL_GAN = {
    "generator_channels": (16, 12, 8, 8, 8),
    "discriminator_channels": (8, 8, 12, 16),
    "encoder_channels": (8, 8, 12, 16),
    "encoder_hidden": 32,
}
SMALL_TRUNK = {"widths": (8, 8, 12, 16), "blocks": (1, 1, 1, 1)}
SMALL_STYLES = {"latent": 16, "style": 16, "mapping_layers": 2}
SMALL_FACEGAN = {
    "sizes_px": (64, 96),
    "widths": (8, 8, 8, 8, 8),
    "head": 4,
    "ages": 8,
    "discriminator_widths": (8, 8, 8, 8),
}
FILES = {
    "identity": "identity.safetensors",
    "gan": "generator.safetensors",
    "age_estimator": "age-estimator.safetensors",
    "encoder": "encoder.safetensors",
    "judge": "judge.safetensors",
    "aging": "generator.safetensors",
    "stylegan": "stylegan.safetensors",
    "facegan": "facegan.safetensors",
}
"""Script that trains -> what it exports."""
PACKAGES = {
    "readers": ("identity", "age_estimator", "judge", "teacher"),
    "age_cgan": ("gan", "encoder", "aging", "latent", "curvature"),
    "facegan": ("stylegan", "make_pairs", "facegan"),
}
BATCH, TICK_IMAGES = 8, 24


def module_name(script):
    """Return the dotted name of a script of `train`."""
    package = next((f"{name}." for name, scripts in PACKAGES.items() if script in scripts), "")
    return f"train.{package}{script}"


def small_gan(**dims):
    from faceage.networks.age_cgan import AgeCGANDims

    return AgeCGANDims(**(SMALL_GAN | dims))


def small_trunk(**dims):
    from faceage.networks.regressors import TrunkDims

    return TrunkDims(**(dims | SMALL_TRUNK))


def small_styles(**dims):
    from faceage.networks.stylegan import StyleGANDims

    return StyleGANDims(**(dims | SMALL_STYLES))


def small_facegan(**dims):
    from faceage.networks.facegan import FaceGANDims

    return FaceGANDims(**(dims | SMALL_FACEGAN))


def shrink_networks(patch):
    """Give every script networks that take milliseconds a step."""
    patch.setattr("train.age_cgan.gan.AgeCGANDims", small_gan)
    patch.setattr("train.readers.identity.TrunkDims", small_trunk)
    patch.setattr("train.readers.age_estimator.TrunkDims", small_trunk)
    patch.setattr("train.readers.judge._WIDTHS", (4, 8, 8, 8))
    patch.setattr("train.facegan.stylegan.StyleGANDims", small_styles)
    patch.setattr("train.facegan.stylegan.WIDTHS", {64: (8, 8, 8, 8, 8)})
    patch.setattr("train.facegan.facegan.FaceGANDims", small_facegan)


def draw_nothing(patch):
    """Leave out the curves of each tick, which take longer to draw than all else in it."""
    patch.setattr("train.run.draw_curves", lambda lines, path: None)


def shrink_steps(patch):
    """Give every script a small batch, and a tick every third step."""
    for script in FILES:
        config = importlib.import_module(module_name(script)).Config
        patch.setattr(f"{module_name(script)}.Config", partial(config, batch=BATCH, tick_images=TICK_IMAGES))


def main(validation_file, script, *args):
    import pytest
    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.data.VALIDATION_FILE", Path(validation_file))
        shrink_networks(patch)
        shrink_steps(patch)
        importlib.import_module(module_name(script)).main(args)


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # only a CPU repeats itself to the bit
    sys.path.insert(0, str(Path(__file__).parent.parent.parent))
    main(*sys.argv[1:])
