"""`faceage models`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import click

from faceage.checkpoint import read_header, sha256_of
from faceage.errors import CheckpointError
from faceage.models import (
    BUNDLED_MODELS,
    DEFAULT_MODEL,
    facenet_file,
    find_model,
    import_model,
    list_models,
    user_folder,
)
from faceage.models.fetch import FACENET_BYTES, fetch_facenet


@click.group("models")
def command() -> None:
    """List, describe, fetch and import models."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_command(as_json: bool) -> None:
    """List the models that --model takes."""
    rows = [{"model": name, **_state(name)} for name in list_models()]
    fetched = facenet_file().is_file()
    if as_json:
        click.echo(json.dumps({"models": rows, "facenet": fetched, "folder": str(user_folder())}))
        return
    for row in rows:
        click.echo(f"{row['model']:16} {row['from']:9} {row['state']}")
    click.echo(f"{'facenet':16} {'identity':9} {'fetched' if fetched else 'not here: faceage models fetch facenet'}")


def _state(name: str) -> dict[str, str]:
    try:
        find_model(name)
        state = "ok"
    except CheckpointError as error:
        state = str(error)
    return {"from": "bundled" if name in BUNDLED_MODELS else "imported", "state": state}


@command.command("info")
@click.argument("name", default=DEFAULT_MODEL)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info_command(name: str, as_json: bool) -> None:
    """Describe a model: its files, what they were trained on, and how well they do."""
    _check_name(name)
    described = {}
    for role, path in find_model(name).paths.items():
        header = dataclasses.asdict(read_header(path))
        described[role] = {"file": str(path), "sha256": sha256_of(path), "bytes": path.stat().st_size, **header}
    if as_json:
        click.echo(json.dumps(described, indent=2))
        return
    for role, facts in described.items():
        click.echo(f"{role}: {facts['arch']}, {facts['bytes'] / 1e6:.1f} MB, {facts['file']}")
        shown = ("sha256", "stage", "images_seen", "dims", "input_spec", "dataset", "parents", "metrics", "git_commit")
        for key in shown:
            if facts[key] not in ("", {}):
                click.echo(f"  {key}: {json.dumps(facts[key]) if isinstance(facts[key], dict) else facts[key]}")


def _check_name(name: str) -> None:
    if name not in list_models():
        raise click.BadParameter(f'unknown model "{name}"; there are {", ".join(list_models())}', param_hint="NAME")


@command.command("import")
@click.argument("name")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
def import_command(name: str, files: tuple[Path, ...]) -> None:
    """Make a model of your own checkpoints, all those of one architecture: a FaceGAN's is one file.

    The networks that read ages and identities are the bundled ones, if you do not name your own as well.
    """
    made = import_model(name, list(files))
    click.echo(f"{name}: {', '.join(made.paths)} from {made.generator.parent}; use it with --model {name}")


@command.command("fetch")
@click.argument("name", type=click.Choice(["facenet"]))
@click.option("--overwrite", is_flag=True, help="Fetch it even if it is there.")
def fetch_command(name: str, overwrite: bool) -> None:
    """Download FaceNet (112 MB, once) for --identity facenet."""
    if facenet_file().is_file() and not overwrite:
        click.echo(f"{name} is there: {facenet_file()}")
        return
    if sys.stderr.isatty():
        with click.progressbar(length=FACENET_BYTES, label="downloading", file=sys.stderr) as bar:
            path = fetch_facenet(lambda done, _: bar.update(done - bar.pos))
    else:
        path = fetch_facenet()
    click.echo(f"{name} fetched: {path}")
