"""What every training script needs around its loop: a run folder, a time budget, a log, resume, averaged weights."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

log = logging.getLogger(__name__)


class Run:
    """One training run: its folder, its clock and its log. A run started again in its folder goes on from there."""

    def __init__(self, folder: Path, config: Any, minutes: float) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        self.folder = folder
        self.config = dataclasses.asdict(config)
        self.images_seen = 0
        self._spent_s = 0.0
        self._start = time.monotonic()
        self._budget_s = minutes * 60
        self._console = Console(stderr=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1, default=str))

    @property
    def elapsed_s(self) -> float:
        """Seconds trained, over all sessions of the run."""
        return self._spent_s + time.monotonic() - self._start

    @property
    def progress(self) -> float:
        """Share of the time budget that is used, 0 to 1."""
        return min(1.0, self.elapsed_s / self._budget_s)

    @property
    def is_over(self) -> bool:
        """Whether the budget is used up."""
        return self.elapsed_s >= self._budget_s

    def record(self, **values: float) -> None:
        """Append one line to log.jsonl and show it. A value that is not finite stops the run."""
        line: dict[str, float] = {"images": self.images_seen, "seconds": round(self.elapsed_s, 1)}
        line |= {name: round(float(value), 5) for name, value in values.items()}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        rate = self.images_seen / max(self.elapsed_s, 1e-9)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._console.print(
            f"{self.elapsed_s / 60:6.1f} min  {self.images_seen / 1000:8.1f} kimg  {rate:5.0f}/s  {text}"
        )
        if not all(np.isfinite(v) for v in line.values()):
            raise FloatingPointError(f"a loss is not finite after {self.images_seen} images: {line}")

    def save_state(self, **parts: Any) -> None:
        """Write resume.pt: state dicts and plain values only, so that it loads with weights_only."""
        part = self.folder / "resume.pt.part"
        torch.save({"images_seen": self.images_seen, "seconds": self.elapsed_s, **parts}, part)
        part.rename(self.folder / "resume.pt")

    def load_state(self) -> dict[str, Any] | None:
        """Return what `save_state` wrote, or None in a new run."""
        file = self.folder / "resume.pt"
        if not file.exists():
            return None
        state = torch.load(file, weights_only=True)
        self.images_seen = state["images_seen"]
        self._spent_s = state["seconds"]
        self._start = time.monotonic()
        log.info("resumed %s after %d images", self.folder, self.images_seen)
        return state


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
