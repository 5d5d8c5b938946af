"""`faceage doctor`."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import av.codec
import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from faceage.cache import cache_root
from faceage.cli.environment import machine, versions
from faceage.cli.output import EXIT_ENVIRONMENT
from faceage.engines.registry import BACKENDS, DEFAULT_RUNTIME
from faceage.engines.store import EngineStore
from faceage.errors import EngineError, FaceAgeError
from faceage.extras import EXTRAS, missing
from faceage.media.device import encoder_missing
from faceage.models import facenet_file, find_model, list_models
from faceage.pipeline.request import all_programs

NEEDED_ENCODERS = ("libx264", "libx265")
OTHER_ENCODERS = ("libsvtav1", "libvpx-vp9", "prores_ks", "ffv1", "h264_nvenc", "hevc_nvenc", "av1_nvenc")
COMPILERS = (
    ("TensorRT for RTX", "tensorrt", "portable", "portable, sm_75, sm_86, sm_89 and sm_120, with a GPU or without"),
    ("Torch-TensorRT", "tensorrt", "cuda", "cuda, the GPU of this machine"),
    ("AOTInductor", "aotinductor", "cpu", "cpu, and for cuda where there is a GPU"),
)
"""Name, backend, a target of it, and what it builds for."""
MIN_FREE_GB = 1.0
"""The engines of one model take 0.1 GB; the rest is room for FaceNet and other models."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "note", "fail"]
    found: str
    remedy: str = ""
    """The command that mends it."""


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Also import torch, and ask it for GPUs.")
def command(as_json: bool, verbose: bool) -> None:
    """Say what works on this machine, and how to mend what does not. Exit code 4 if something has to be mended."""
    by_torch = [_torch()] if verbose else []
    checks = [
        *_packages(),
        _encoders(),
        _gpu(),
        *_gpu_video(),
        *by_torch,
        *_backends(),
        _cache(),
        *_models(),
        _facenet(),
    ]
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        table = Table("", "", "found", "to mend it", box=None, pad_edge=False)
        colours = {"ok": "green", "note": "yellow", "fail": "red"}
        for check in checks:
            texts = (escape(text) for text in (check.name, check.found, check.remedy))  # "faceage[torch]" is no markup
            table.add_row(f"[{colours[check.state]}]{check.state}[/]", *texts)
        Console().print(table)
    if any(check.state == "fail" for check in checks):
        raise click.exceptions.Exit(EXIT_ENVIRONMENT)


def _packages() -> Iterator[Check]:
    facts = machine()
    yield Check(name="machine", state="ok", found=f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']} GB")
    for name, version in versions().items():
        yield Check(name=name, state="ok", found=version)
    for name, extra in EXTRAS.items():
        absent = missing(name, "") is not None
        yield Check(
            name=f"faceage[{name}]",
            state="note" if absent else "ok",
            found=f"{'not ' if absent else ''}installed, for: {extra.commands}",
            remedy=f"pip install 'faceage[{name}]'" if absent else "",
        )


def _encoders() -> Check:
    there = [name for name in (*NEEDED_ENCODERS, *OTHER_ENCODERS) if name in av.codec.codecs_available]
    missing = [name for name in NEEDED_ENCODERS if name not in there]
    return Check(
        name="encoders",
        state="fail" if missing else "ok",
        found=", ".join(there) + (f"; missing: {', '.join(missing)}" if missing else ""),
        remedy="pip install --force-reinstall av" if missing else "",
    )


def _gpu() -> Check:
    if shutil.which("nvidia-smi") is None:
        return Check(name="GPU", state="note", found="no NVIDIA driver (no nvidia-smi): everything runs on the CPU")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (subprocess.SubprocessError, OSError) as error:
        return Check(name="GPU", state="note", found=f"nvidia-smi fails ({error}): everything runs on the CPU")
    return Check(name="GPU", state="ok", found=f"{'; '.join(found.splitlines())}; use it with --device cuda")


def _gpu_video() -> Iterator[Check]:
    """Say whether a GPU's decoder and encoder can be used, where there is a GPU."""
    if shutil.which("nvidia-smi") is None:
        return
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        found = "libnvcuvid.so.1 is not found, so videos are decoded on the CPU"
        yield Check(name="NVDEC", state="note", found=found, remedy="export NVIDIA_DRIVER_CAPABILITIES=all")
    else:
        yield Check(name="NVDEC", state="ok", found="decodes 4:2:0 video on the GPU")
    if reason := encoder_missing("h264_nvenc", "nv12", "cuda:0"):
        yield Check(name="NVENC", state="note", found=f"{reason}: videos are encoded on the CPU")
    else:
        yield Check(name="NVENC", state="ok", found="encodes video on the GPU")


def _torch() -> Check:
    import torch

    if torch.cuda.is_available():
        return Check(name="torch", state="ok", found=f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} devices")
    return Check(name="torch", state="note", found="sees no CUDA device")


def _backends() -> Iterator[Check]:
    """Say what engines can be built here, for which targets."""
    for name, backend, target, builds in COMPILERS:
        if reason := BACKENDS[backend].missing(target):
            found, _, remedy = reason.partition("; ")
            yield Check(name=name, state="note", found=found, remedy=remedy.removeprefix("run: "))
        else:
            yield Check(name=name, state="ok", found=f"builds engines for {builds}")


def _cache() -> Check:
    folder = cache_root()
    remedy = "export FACEAGE_CACHE=/a/folder/that/can/be/written"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free_gb = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        return Check(name="cache", state="fail", found=f"{folder} cannot be written ({reason})", remedy=remedy)
    found = f"{folder}, {free_gb:.1f} GB free"
    return Check(name="cache", state="ok", found=found) if free_gb >= MIN_FREE_GB else Check(
        name="cache", state="fail", found=found, remedy=remedy
    )  # fmt: skip


def _models() -> Iterator[Check]:
    store = EngineStore()
    try:
        precision = DEFAULT_RUNTIME.backend.best_precision("cpu")
    except EngineError as error:
        found, _, remedy = str(error).partition("; run: ")
        yield Check(name=DEFAULT_RUNTIME.backend.name, state="fail", found=found, remedy=remedy)
        return
    for name in list_models():
        try:
            files = find_model(name)
        except FaceAgeError as error:
            yield Check(
                name=f"model {name}", state="fail", found=str(error), remedy="pip install --force-reinstall faceage"
            )
            continue
        programs = all_programs(name)
        built = sum(store.contains(program, spec=program.spec("cpu", precision)) for program in programs)
        found = f"{len(files.paths)} checkpoints; {built} of {len(programs)} engines built"
        if built < len(programs):
            found += ", the others are built on first use"
        yield Check(name=f"model {name}", state="ok", found=found)


def _facenet() -> Check:
    if facenet_file().is_file():
        return Check(name="facenet", state="ok", found=str(facenet_file()))
    found = "not fetched; only --identity facenet needs it"
    return Check(name="facenet", state="note", found=found, remedy="faceage models fetch facenet")
