"""`faceage compile`."""

from __future__ import annotations

import itertools
from typing import Literal, get_args

import click

from faceage.cli.options import backend_option, check_model, model_option, output_options
from faceage.cli.output import Output
from faceage.engines import tensorrt
from faceage.engines.base import TARGETS, Precision, Spec
from faceage.engines.store import Backend, EngineStore, check_buildable
from faceage.errors import EngineError
from faceage.pipeline.request import all_programs


@click.command("compile")
@click.option(
    "--target", type=click.Choice(list(TARGETS)), required=True,
    help="; ".join(f"{name}: {what}" for name, what in TARGETS.items()) + ".",
)  # fmt: skip
@click.option(
    "--precision", "precisions", type=click.Choice(get_args(Precision)), multiple=True,
    help="May be given twice. Default: fp32 for the CPU, fp16 for sm_75, both for other GPUs.",
)  # fmt: skip
@model_option
@backend_option
@output_options
def command(
    *, target: str, precisions: tuple[Precision, ...], model: str, backend: Backend | Literal["auto"], out: Output
) -> None:
    """Build the engines of a model for a target, ahead of time.

    All but "cuda" are built on any machine: those for NVIDIA GPUs need no GPU here. They are kept in the cache folder
    (FACEAGE_CACHE), which may be copied to where they run. An engine that differs from torch is not kept.
    """
    check_model(model)
    backend = _backend_for(target) if backend == "auto" else backend
    with out:
        out.detail(f"model {model}, backend {backend} for {target}")
        store = EngineStore(on_build=out.building)
        specs = [Spec(target, precision) for precision in precisions or _precisions_for(target)]
        for spec in specs:
            check_buildable(backend, spec)
        for spec, program in itertools.product(specs, all_programs(model)):
            try:
                record, is_new = store.build(program, backend, spec)
            except EngineError as error:
                out.item({"engine": program.name, "target": target, "precision": spec.precision, "error": str(error)})
                continue
            out.item({"engine": store.path(program, backend, spec).name, "built": is_new, **record})
            out.line(f"{describe(record)}{'' if is_new else '  in the store already'}")


def describe(record: dict) -> str:
    """Return an engine's sidecar as one line."""
    parity = record.get("parity") or record.get("graph_parity") or {}
    note = "" if record.get("parity") else " (graph only)"
    return (
        f"{record['program']:20} {record['backend']:12} {record['target']:9} {record['precision']}  "
        f"{record['bytes'] / 1e6:6.1f} MB  {record['build_seconds']:6.1f} s  "
        f"max {parity.get('max_abs_error', float('nan')):.1e}  {parity.get('psnr_db', float('nan')):5.1f} dB{note}"
    )


def _backend_for(target: str) -> Backend:
    if target == "cpu":
        return "onnxruntime"
    return "aotinductor" if target == "cuda" and tensorrt.missing("cuda") else "tensorrt"


def _precisions_for(target: str) -> tuple[Precision, ...]:
    return {"cpu": ("fp32",), "sm_75": ("fp16",)}.get(target, ("fp16", "fp32"))  # type: ignore[return-value]
