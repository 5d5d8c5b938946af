"""`faceage engines`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from faceage.cli.compile import describe
from faceage.cli.output import EXIT_SOME_FAILED
from faceage.engines.store import EngineStore, Stored
from faceage.errors import CheckpointError
from faceage.models import list_models
from faceage.pipeline.request import all_programs

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("engines")
def command() -> None:
    """List, verify and prune the engines that are stored."""


@command.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List the engines: backend, target, precision, size, seconds to build, and the largest difference from torch.

    "graph only": built where there was no such GPU, so only its graph was compared; the engine itself is compared when
    it is first loaded on one.
    """
    store = EngineStore()
    found = store.stored()
    if as_json:
        engines = [{"file": engine.path.name, "fault": engine.fault, **engine.record} for engine in found]
        click.echo(json.dumps({"folder": str(store.root), "engines": engines}, indent=2))
        return
    for engine in found:
        click.echo(_line(engine))
    click.echo(f"{len(found)} engines in {store.root}")


@command.command("verify")
@json_option
def verify_command(as_json: bool) -> None:
    """Compare each engine's file with its sidecar. Exit code 1 if one is damaged; it is rebuilt when it is needed."""
    found = EngineStore().stored()
    damaged = [engine for engine in found if engine.fault]
    if as_json:
        faults = [{"file": engine.path.name, "fault": engine.fault} for engine in damaged]
        click.echo(json.dumps({"engines": len(found), "damaged": faults}, indent=2))
    else:
        for engine in damaged:
            click.echo(_line(engine))
            target = engine.record.get("target", "cpu")
            click.echo(f"  to mend it: faceage compile --target {target}, or: faceage engines prune")
        click.echo(f"{len(found) - len(damaged)} of {len(found)} engines are as they were built")
    if damaged:
        raise click.exceptions.Exit(EXIT_SOME_FAILED)


@command.command("prune")
def prune_command() -> None:
    """Remove engines that are damaged, for other versions of the backends, or of models that are no longer here."""
    programs = []
    for model in list_models():
        try:
            programs += all_programs(model)
        except CheckpointError as error:
            click.echo(f"model {model} cannot be read, its engines go too: {error}", err=True)
    removed: list[Path] = EngineStore().prune(programs)
    for path in removed:
        click.echo(f"removed {path.name}")
    click.echo(f"{len(removed)} files removed")


def _line(engine: Stored) -> str:
    if not engine.fault and "bytes" in engine.record:
        return describe(engine.record)
    return f"{engine.path.name}: {engine.fault}"
