"""`faceage compile`."""

from __future__ import annotations

from typing import Literal, get_args

import click

from faceage.cli.options import backend_option, check_model, model_option, output_options
from faceage.cli.output import Output
from faceage.engines.base import TARGETS, Backend, Precision, Spec
from faceage.engines.registry import BACKENDS, BackendName, backend_named
from faceage.engines.store import EngineStore, check_buildable
from faceage.errors import EngineError
from faceage.pipeline.request import all_programs


@click.command("compile")
@click.option(
    "--target", type=click.Choice(list(TARGETS)), required=True,
    help="; ".join(f"{name}: {what}" for name, what in TARGETS.items()) + ".",
)  # fmt: skip
@click.option(
    "--precision", "precisions", type=click.Choice(get_args(Precision)), multiple=True,
    help="May be given twice. Default: bf16 for a CPU that has it, else fp32; fp16 for sm_75; both for other GPUs.",
)  # fmt: skip
@model_option
@backend_option
@output_options
def command(
    *, target: str, precisions: tuple[Precision, ...], model: str, backend: BackendName | Literal["auto"], out: Output
) -> None:
    """Build the engines of a model for a target, ahead of time.

    All but "cuda" are built on any machine: those for NVIDIA GPUs need no GPU here. They are kept in the cache folder
    (FACEAGE_CACHE), which may be copied to where they run. An engine that differs from torch is not kept.
    """
    check_model(model)
    builder = _backend_for(target) if backend == "auto" else backend_named(backend)
    with out:
        out.detail(f"model {model}, backend {builder.name} for {target}")
        store = EngineStore(on_build=out.building)
        wanted = precisions or _precisions_for(builder, target)
        for precision in wanted:
            check_buildable(builder, Spec(target, precision))
        programs = [program for program in all_programs(model) if builder.suffix(program, target) is not None]
        if not programs:
            raise EngineError(f"backend {builder.name} runs graphs as they are: there is nothing to build; just use it")
        # What measures is in fp32 in any case, and is built once.
        pairs = [(program, program.spec(target, precision)) for precision in wanted for program in programs]
        for program, spec in {(program.name, spec): (program, spec) for program, spec in pairs}.values():
            try:
                record, is_new = store.build(program, builder, spec)
            except EngineError as error:
                out.item({"engine": program.name, "target": target, "precision": spec.precision, "error": str(error)})
                continue
            out.item({"engine": store.path(program, builder, spec).name, "built": is_new, **record})
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
    """Return the first backend that builds for a target here, or that would if what it misses were installed."""
    kind = "cpu" if target == "cpu" else "cuda"
    builders = [backend for backend in BACKENDS.values() if kind in backend.kinds]
    return next((backend for backend in builders if target != "cuda" or not backend.missing(target)), builders[0])


def _precisions_for(backend: Backend, target: str) -> tuple[Precision, ...]:
    if target == "cpu":
        return (backend.best_precision("cpu"),)
    return ("fp16",) if target == "sm_75" else ("fp16", "fp32")
