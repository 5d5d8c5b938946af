"""Blind comparison by eye: sheets of pairs whose sides are shuffled, and the key.

    python -m train.evaluate.blind --original ORIGINALS --left A --right B --pairs 40 --out sheets

The three folders hold pictures of the same names, as `train.evaluate.appearance --pictures` writes them. Each row of a
sheet shows one face: the original in the middle, the picture of folder A or B on its left, that of the other on its
right. Look at the sheets, note the better side of each row, and only then open `key.json`: number of the row -> the
picture's name, and which folder is on the left and on the right. Sides are drawn evenly: preferring one scores half.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import cv2
import numpy as np

from faceage.errors import MediaError
from train.run import Script

CELL_PX = 320
ROWS = 10
"""Pairs on a sheet."""


def draw_sides(count: int, random: np.random.Generator) -> np.ndarray:
    """Return for each pair whether A is on the left: bool [count], half of them true."""
    return random.permutation(np.arange(count) % 2 == 0)


def pair_row(number: int, left: np.ndarray, original: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return one row of a sheet, BGR, with its number."""
    cells = []
    for picture in (left, original, right):
        scale = CELL_PX / max(picture.shape[:2])
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        small = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=method)[:CELL_PX, :CELL_PX]
        cell = np.full((CELL_PX, CELL_PX, 3), 255, np.uint8)
        cell[: small.shape[0], : small.shape[1]] = small
        cells.append(cell)
    margin = np.full((CELL_PX, 60, 3), 255, np.uint8)
    cv2.putText(margin, str(number), (6, CELL_PX // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.9, (0, 0, 0), 2, cv2.LINE_AA)
    return np.concatenate([margin, *cells], 1)


def _read(path: Path) -> np.ndarray:
    picture = cv2.imread(str(path))
    if picture is None:
        raise MediaError(f"{path} is no readable picture")
    return picture


@click.command(cls=Script, context_settings={"show_default": True})
@click.option("--original", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of originals.")
@click.option("--left", type=click.Path(exists=True, path_type=Path), required=True, help="Folder A.")
@click.option("--right", type=click.Path(exists=True, path_type=Path), required=True, help="Folder B.")
@click.option("--pairs", type=click.IntRange(1), default=40, help="Faces to compare.")
@click.option("--seed", type=int, default=0, help="Of the faces and of the sides.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the sheets and the key.")
def main(original: Path, left: Path, right: Path, pairs: int, seed: int, out: Path) -> None:
    """Write sheets of shuffled pairs, and their key."""
    names = sorted(
        set.intersection(*({path.name for path in folder.glob("*.png")} for folder in (original, left, right)))
    )
    if len(names) < pairs:
        raise MediaError(f"the folders share {len(names)} names of PNG pictures, {pairs} are asked for; give --pairs")
    random = np.random.default_rng(seed)
    chosen = random.permutation(names)[:pairs].tolist()
    is_left = draw_sides(pairs, random)
    out.mkdir(parents=True, exist_ok=True)
    key, rows = {}, []
    for i, (name, a_left) in enumerate(zip(chosen, is_left.tolist(), strict=True), 1):
        a, middle, b = (_read(folder / name) for folder in (left, original, right))
        rows.append(pair_row(i, *((a, middle, b) if a_left else (b, middle, a))))
        key[i] = {"name": name, "left": "A" if a_left else "B", "right": "B" if a_left else "A"}
        if len(rows) == ROWS or i == pairs:
            cv2.imwrite(str(out / f"sheet-{(i - 1) // ROWS + 1}.png"), np.concatenate(rows))
            rows = []
    (out / "key.json").write_text(json.dumps({"A": str(left), "B": str(right), "pairs": key}, indent=1))
    click.echo(f"{pairs} pairs in {out}; look first, then open key.json")


if __name__ == "__main__":
    main()
