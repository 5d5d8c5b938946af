"""What every training script needs around its loop: options, run folder, budget, log, resume, averaged weights."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

from faceage.checkpoint import sha256_of
from faceage.errors import CheckpointError, FaceAgeError

log = logging.getLogger(__name__)


class Script(click.Command):
    """A command that shows an error which the user can act on, a wrong checkpoint say, as one line; exit code 1."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the script."""
        try:
            return super().invoke(ctx)
        except FaceAgeError as error:
            raise click.ClickException(str(error)) from error


def run_options(minutes: float) -> Callable[[Callable], Callable]:
    """Return a decorator that adds the options of every script that trains: data, out, cache, minutes, images."""
    existing, path = click.Path(exists=True, path_type=Path), click.Path(path_type=Path)
    budget = "Time budget, all sessions of the run together."
    images = "Budget in images instead. The learning rate follows it: a resumed run repeats an unbroken one's losses."
    options = [
        click.option("--data", type=existing, required=True, help="UTKFace, a tar or a folder."),
        click.option("--out", type=path, required=True, help="Run folder; resumed if it exists."),
        click.option("--cache", type=path, default=Path("runs/cache"), help="Aligned faces."),
        click.option("--minutes", type=click.FloatRange(0, min_open=True), default=minutes, help=budget),
        click.option("--images", type=click.IntRange(1), help=images),
    ]

    def decorate(function: Callable) -> Callable:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class Part(Protocol):
    """What a run saves and restores: networks, averages, optimizers, samplers."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors and plain values only."""

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Take a state over."""


class Run:
    """One training run: its folder, its budget and its log. A run started again in its folder goes on from there.

    `resume.pt` is written last at a tick, so whatever a killed session left behind it is done again: the same, if the
    budget is in images and the arithmetic repeatable (it is on a CPU).
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        minutes: float,
        images: int | None = None,
        *,
        dims: Any = None,
        parents: Mapping[str, Path] | None = None,
    ) -> None:
        """Open a run folder.

        Args:
            folder: made if it is not there.
            config: dataclass of the script's hyper-parameters; a run keeps them.
            minutes: time budget of all sessions of the run together.
            images: budget in images instead of minutes.
            dims: dataclass of the networks' dimensions; a run keeps them.
            parents: stage to checkpoint that the run is trained from; a run keeps them.

        Raises:
            CheckpointError: if the folder holds a run with other settings or parents.
        """
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        self.folder = folder
        self.config = dataclasses.asdict(config)
        self.parents = {stage: sha256_of(path) for stage, path in (parents or {}).items()}
        self.images_seen = 0
        shape = {} if dims is None else {f"dims.{name}": value for name, value in dataclasses.asdict(dims).items()}
        self._settings = json.loads(json.dumps(self.config | shape, default=str))
        self._budget_s, self._budget_images = minutes * 60, images
        self._spent_s = 0.0
        self._start = time.monotonic()
        self._console = Console(stderr=True)
        self._saved = self._read_state()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1, default=str))

    @property
    def elapsed_s(self) -> float:
        """Seconds trained, over all sessions of the run."""
        return self._spent_s + time.monotonic() - self._start

    @property
    def progress(self) -> float:
        """Share of the budget that is used, 0 to 1."""
        if self._budget_images is not None:
            return min(1.0, self.images_seen / self._budget_images)
        return min(1.0, self.elapsed_s / self._budget_s)

    @property
    def is_over(self) -> bool:
        """Whether the budget is used up."""
        return self.progress >= 1

    def record(self, **values: float) -> None:
        """Append one line to log.jsonl, show it and draw curves.png. A value that is not finite stops the run."""
        line: dict[str, float] = {"images": self.images_seen, "seconds": round(self.elapsed_s, 1)}
        line |= {name: round(float(value), 5) for name, value in values.items()}
        file = self.folder / "log.jsonl"
        with file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        rate = self.images_seen / max(self.elapsed_s, 1e-9)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._console.print(
            f"{self.elapsed_s / 60:6.1f} min  {self.images_seen / 1000:8.1f} kimg  {rate:5.0f}/s  {text}"
        )
        if not all(np.isfinite(v) for v in line.values()):
            raise FloatingPointError(f"a loss is not finite after {self.images_seen} images: {line}")
        draw_curves([json.loads(text) for text in file.read_text().splitlines()], self.folder / "curves.png")

    def save_state(self, parts: Mapping[str, Part]) -> None:
        """Write resume.pt: tensors and plain values only, so that it loads with weights_only.

        Call it last at a tick, after `record` and the export: a run that is killed before does the tick again.
        """
        state = {name: part.state_dict() for name, part in parts.items()} | {
            "images_seen": self.images_seen,
            "seconds": self.elapsed_s,
            "settings": self._settings,
            "parents": self.parents,
            "random": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["random_cuda"] = torch.cuda.get_rng_state()
        part = self.folder / "resume.pt.part"
        torch.save(state, part)
        part.replace(self.folder / "resume.pt")

    def load_state(self, parts: Mapping[str, Part]) -> None:
        """Go on from the last checkpoint, if there is one, and start the clock."""
        state, self._saved = self._saved, None
        if state is not None:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            torch.set_rng_state(state["random"])
            if torch.cuda.is_available() and "random_cuda" in state:
                torch.cuda.set_rng_state(state["random_cuda"])
            self.images_seen = state["images_seen"]
            self._spent_s = state["seconds"]
            log.info("resumed %s after %d images", self.folder, self.images_seen)
        self._forget_unsaved_lines()
        self._start = time.monotonic()

    def _read_state(self) -> dict[str, Any] | None:
        file = self.folder / "resume.pt"
        if not file.exists():
            return None
        state = torch.load(file, weights_only=True, map_location="cpu")
        if "settings" not in state:
            raise CheckpointError(f"{file} is of an older version and cannot be resumed exactly; name another --out")
        was, now = state["settings"], self._settings
        changed = [
            f"{name} was {was.get(name)}, is {now.get(name)}" for name in was | now if was.get(name) != now.get(name)
        ]
        for stage in state["parents"] | self.parents:
            before, after = (parents.get(stage, "not given")[:12] for parents in (state["parents"], self.parents))
            if before != after:
                changed.append(f"its parent {stage} was {before}, is {after}")
        if changed:
            raise CheckpointError(
                f"{self.folder} holds a run that was started otherwise: {'; '.join(changed)}. "
                "Start it as before, or name another --out"
            )
        return state

    def _forget_unsaved_lines(self) -> None:
        """Remove what a killed session logged after its last checkpoint, a half-written line included."""
        file = self.folder / "log.jsonl"
        if not file.exists():
            return
        lines = [text for text in file.read_text().splitlines(keepends=True) if text.endswith("\n")]
        part = file.with_name("log.jsonl.part")
        part.write_text("".join(text for text in lines if json.loads(text)["images"] <= self.images_seen))
        part.replace(file)


class EMA:
    """An exponential moving average of a network's weights, its half-life counted in images."""

    def __init__(self, net: nn.Module, half_life_images: int) -> None:
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.half_life = half_life_images

    @torch.no_grad()
    def update(self, net: nn.Module, batch: int, images_seen: int) -> None:
        """Move the average toward `net`; the half-life is shorter at the start, so that the noise is forgotten."""
        decay = 0.5 ** (batch / max(1.0, min(self.half_life, images_seen * 0.1)))
        for mine, theirs in zip(self.net.state_dict().values(), net.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, 1 - decay)
            else:
                mine.copy_(theirs)


def draw_curves(lines: list[dict[str, float]], path: Path) -> None:
    """Draw every logged value against the images seen, a panel each."""
    names = [
        name for name in dict.fromkeys(name for line in lines for name in line) if name not in ("images", "seconds")
    ]
    if not names:
        return
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.5 * columns, 2.5 * rows))
    for i, name in enumerate(names):
        axis = figure.add_subplot(rows, columns, i + 1)
        points = [(line["images"] / 1000, line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), marker=".", markersize=3)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if i >= len(names) - columns:
            axis.set_xlabel("thousand images", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def sheet(rows: list[Tensor], path: Path, scale: int = 1) -> None:
    """Write rows of faces, each [N, 3, S, S] in [-1, 1], as one PNG."""
    import cv2

    strips = []
    for row in rows:
        pixels = ((row.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        strips.append(np.concatenate(list(pixels), 1))
    picture = np.concatenate(strips, 0)[:, :, ::-1]
    picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(path), picture)


def git_commit() -> str:
    """Return the commit that the scripts run at, with "+" where the tree differs from it."""
    run = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return run.stdout.strip()


def device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(where: torch.device) -> torch.autocast:
    """Return a context in which networks compute in bfloat16 where that is fast: on a GPU, and on CPUs that have it.

    Other CPUs emulate it: a face network was 16 times slower than in float32.
    """
    is_fast = where.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(where.type, torch.bfloat16, enabled=is_fast)
