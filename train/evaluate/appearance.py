"""What the eye sees of aged faces, measured without an age estimator.

    python -m train.evaluate.appearance --data UTKFACE --heads AAF --fgnet FGNET --teacher mobilefacenet_casia.ckpt \
        --model facegan --out out/appearance

Validation faces of UTKFace are aged to 70 and to 25 by the product's own path and set beside real ones of 62-78 and
21-29, drawn with the same mix of the data set's gender and race labels; whole heads of All-Age-Faces to 70 beside real
ones of 65-75; and FG-NET's people to the ages of their other photos. The measures are in `c2st`, `prototype` (recovery
and dirt), `bands`, `hair` and `fgnet`. No single one decides. Beside the models stand rows whose answer is known: doing
nothing, real photos of the age, a blur, stripes, a stranger of the age pasted into the face. `--row NAME=FOLDER` adds
pictures made elsewhere, for example by a teacher; `--pictures` writes the pictures as such folders (the originals too).
Writes `appearance.json` and `appearance.md`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import click
import cv2
import numpy as np
import torch

from faceage.errors import MediaError
from faceage.geometry import template_5
from faceage.models import BUNDLED_MODELS
from faceage.pipeline.request import Networks, load_networks
from faceage.types import FloatArray
from train.data import find_landmarks, warp_faces
from train.evaluate import fgnet, hair
from train.evaluate.bands import band_energies, energy_errors
from train.evaluate.c2st import fine_features, full_features, held_out_auc
from train.evaluate.composites import age_pictures
from train.evaluate.faces import blur_face, mask_in_picture, paste_face
from train.evaluate.photos import Photos, draw_alike, read_aaf, read_utkface, read_utkface_sample
from train.evaluate.prototype import dirt, log_colours, recovery
from train.evaluate.scorecard import plain, show, table
from train.readers.teacher import MobileFaceNet, load_teacher
from train.run import Script, git_commit

log = logging.getLogger(__name__)

NOTHING, REAL, BLUR, STRIPES, STRANGER = "do nothing", "real photos", "blur", "stripes", "a stranger"
VIEW_PX = 160
"""Side of the crops that are measured: UTKFace's faces have 200."""
_JPEG_PX, _JPEG_QUALITY = 192, 92
STRIPE_STRENGTH, STRIPES_A_FACE = 0.12, 24
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Direction:
    """To which age whom, and what to set beside it."""

    target: float
    sources: tuple[int, int]
    """Ages of the faces that are aged, the first and the last."""
    real: tuple[int, int]
    """Ages of the real faces."""


DIRECTIONS = {
    "to 70": Direction(target=70, sources=(20, 50), real=(62, 78)),
    "to 25": Direction(target=25, sources=(40, 75), real=(21, 29)),
}
PROTOTYPE_FACES = 400
"""Real faces whose means are an age's prototype and band energies: of all of UTKFace, for these are properties of the
age and not of a face."""
HAIR_DIRECTION = Direction(target=70, sources=(20, 40), real=(65, 75))


def choose(photos: Photos, direction: Direction, count: int) -> tuple[Photos, Photos]:
    """Return the faces to age and the real ones, at most `count` each, of the same mix of labels."""
    random = np.random.default_rng(SEED)
    labels = _labels(photos)
    sources, real = photos.aged(*direction.sources), photos.aged(*direction.real)
    if len(sources) < len(real):  # the rarer set is drawn at random, the other one like it
        sources = random.permutation(sources)[:count]
        real = real[draw_alike(labels[real], labels[sources], count, random)]
    else:
        real = random.permutation(real)[:count]
        sources = sources[draw_alike(labels[sources], labels[real], count, random)]
    return photos.rows(sources), photos.rows(real)


def _labels(photos: Photos) -> np.ndarray:
    return photos.genders * 10 + photos.races


def view(pictures: list[np.ndarray], landmarks: FloatArray) -> np.ndarray:
    """Return aligned crops, uint8 [N, 160, 160, 3], all through the same resampling and compression.

    A picture that was changed has lost the marks of its own JPEG compression, which a classifier would see. Each crop
    is therefore compressed once more, after it was resampled, and resampled again.
    """
    crops = []
    for crop in aligned(pictures, landmarks, _JPEG_PX):
        coded = cv2.imencode(".jpg", crop, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1]
        decoded = cv2.imdecode(coded, cv2.IMREAD_UNCHANGED)
        crops.append(cv2.resize(decoded, (VIEW_PX, VIEW_PX), interpolation=cv2.INTER_AREA))
    return np.stack(crops)


def aligned(pictures: list[np.ndarray], landmarks: FloatArray, size_px: int) -> np.ndarray:
    """Return aligned crops, uint8 [N, size_px, size_px, 3], with nothing else done to them."""
    return warp_faces(pictures, landmarks, template_5(size_px), size_px, size_px)


def stripe(picture: np.ndarray, landmarks: FloatArray) -> np.ndarray:
    """Return the picture with dark stripes across the face: lines that no age has."""
    mask = mask_in_picture(picture, landmarks)
    eyes = np.linalg.norm(landmarks[1] - landmarks[0])
    rows = np.arange(picture.shape[0])[:, None] / (eyes / 0.39)  # in sides of the aligned crop
    ratio = np.exp(STRIPE_STRENGTH * np.sin(2 * np.pi * STRIPES_A_FACE * rows) * mask)
    return np.clip(np.rint(picture * ratio[..., None]), 0, 255).astype(np.uint8)


def known_rows(sources: Photos, real: Photos) -> dict[str, list[np.ndarray]]:
    """Return the rows whose answer is known, a picture a source."""
    random = np.random.default_rng(SEED)
    donors = random.choice(len(real), len(sources), replace=len(real) < len(sources))
    pairs = list(zip(sources.pictures, sources.landmarks, strict=True))
    return {
        NOTHING: list(sources.pictures),
        BLUR: [blur_face(picture, points) for picture, points in pairs],
        STRIPES: [stripe(picture, points) for picture, points in pairs],
        STRANGER: [
            paste_face(picture, points, real.pictures[donor], real.landmarks[donor])
            for (picture, points), donor in zip(pairs, donors, strict=True)
        ],
    }


class Measures:
    """Measures rows of pictures of one direction: each row shows the same people."""

    def __init__(self, sources: Photos, real: Photos, many: Photos, teacher: MobileFaceNet) -> None:
        self._sources, self._teacher = sources, teacher
        self._who = fgnet.embed_faces(teacher, list(sources.pictures), sources.landmarks)
        self._before = aligned(list(sources.pictures), sources.landmarks, VIEW_PX)
        self._real_crops = aligned(list(many.pictures), many.landmarks, VIEW_PX)
        self._own_logs = log_colours(aligned(list(real.pictures), real.landmarks, VIEW_PX))
        self._before_logs, self._real_logs = log_colours(self._before), log_colours(self._real_crops)
        view_of_real = view(list(real.pictures), real.landmarks)
        self._real = {"full": full_features(view_of_real), "fine": fine_features(view_of_real)}
        self._own_energies = band_energies(view_of_real)
        self._energies = band_energies(view(list(many.pictures), many.landmarks))

    def row(self, pictures: list[np.ndarray]) -> dict:
        """Return all figures of one row."""
        landmarks, scores = find_landmarks(pictures)  # as the real ones' were found
        seen = view(pictures, landmarks)
        crops = aligned(pictures, self._sources.landmarks, VIEW_PX)
        who = fgnet.embed_faces(self._teacher, pictures, self._sources.landmarks)
        made_logs = log_colours(crops)
        return {
            "c2st_full": held_out_auc(full_features(seen), self._real["full"]),
            "c2st_fine": held_out_auc(fine_features(seen), self._real["fine"]),
            "prototype": recovery(made_logs, self._before_logs, self._real_logs),
            "bands": energy_errors(band_energies(seen), self._energies),
            "dirt": dirt(crops, self._before, self._real_crops),
            "identity": float((who * self._who).sum(1).mean()),
            "not_found": int((scores < 0.5).sum()),
        }

    def real_row(self) -> dict:
        """Return the figures of real faces: one half against the other, or all against the age's means."""
        order = np.random.default_rng(SEED).permutation(len(self._own_logs))
        a, b = order[::2], order[1::2]
        return {
            "c2st_full": held_out_auc(self._real["full"][a], self._real["full"][b]),
            "c2st_fine": held_out_auc(self._real["fine"][a], self._real["fine"][b]),
            "prototype": recovery(self._own_logs, self._before_logs, self._real_logs, are_pairs=False),
            "bands": energy_errors(self._own_energies, self._energies),
        }


def read_row(folder: Path, names: np.ndarray) -> list[np.ndarray]:
    """Read one row of pictures, PNG files by the sources' names."""
    pictures = []
    for name in names.tolist():
        picture = cv2.imread(str(folder / f"{name}.png"))
        if picture is None:
            raise MediaError(f"{folder} has no picture {name}.png; a row needs one for each source (see --pictures)")
        pictures.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
    return pictures


def write_row(folder: Path, names: np.ndarray, pictures: list[np.ndarray]) -> None:
    """Write one row of pictures as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in zip(names.tolist(), pictures, strict=True):
        cv2.imwrite(str(folder / f"{name}.png"), picture[:, :, ::-1])


def render(results: dict) -> str:
    """Return the results as Markdown."""
    parts = [f"# Appearance\n\nCode at {results['commit'] or 'no commit'}, {results['seconds']:.0f} s."]
    parts += [render_direction(name, section) for name, section in results["directions"].items()]
    if results["hair"]:
        parts.append(render_hair(results["hair"]))
    if results["fgnet"]:
        parts.append(fgnet.render(results["fgnet"]))
    return "\n\n".join(parts) + "\n"


def render_direction(name: str, section: dict) -> str:
    """Return the rows of one direction as Markdown."""
    header = ("", "C2ST full", "C2ST fine", "recovery", "off", "bands", "large", "asymmetry", "low", "identity")
    rows = []
    for row, figures in section["rows"].items():
        tests = [figures[key] for key in ("c2st_full", "c2st_fine")]
        cells = [f"{show(test['auc'], 3)} ± {show(test['error'], 3)}" for test in tests]
        cells += [show(figures["prototype"][key], 2) for key in ("recovery", "off")]
        cells.append(show(figures["bands"]["mean"], 3))
        cells += [show(figures.get("dirt", {}).get(key), 4) for key in ("large", "asymmetry", "low")]
        rows.append((row, *cells, show(figures.get("identity"), 3)))
    return f"## {name}: {section['n']} faces, {section['real']} real\n\n" + table(header, rows)


def render_hair(section: dict) -> str:
    """Return the colours of hair and brows as Markdown."""
    names = ("hair_luma", "hair_chroma", "brow_luma", "brow_chroma")
    rows = [(row, *(show(figures[name], 2) for name in names)) for row, figures in section["rows"].items()]
    title = f"## Hair and brows at 70, in deviations of real people: {section['n']} heads, {section['real']} real"
    return f"{title}\n\n" + table(("", "hair luma", "hair chroma", "brow luma", "brow chroma"), rows)


def measure_direction(
    name: str, archive: Path, photos: Photos, models: list[Networks], teacher: MobileFaceNet, count: int,
    rows: dict[str, Path], out: Path | None,
) -> dict:  # fmt: skip
    """Age the faces of one direction with each model, and measure every row."""
    direction = DIRECTIONS[name]
    sources, real = choose(photos, direction, count)
    pool = read_utkface_sample(archive, direction.real, 2 * PROTOTYPE_FACES)
    many = pool.rows(draw_alike(_labels(pool), _labels(sources), PROTOTYPE_FACES, np.random.default_rng(SEED)))
    measures = Measures(sources, real, many, teacher)
    made = known_rows(sources, real)
    targets = np.full(len(sources), direction.target, np.float32)
    for networks in models:
        aged = age_pictures(networks, list(sources.pictures), sources.landmarks, targets)
        made[networks.model] = aged.pictures
        log.info("%s, %s: aged; %d left alone", name, networks.model, int((aged.shares == 0).sum()))
    folder = name.replace(" ", "-")
    made |= {row: read_row(path / folder, sources.names) for row, path in rows.items()}
    if out is not None:
        for row, pictures in made.items():
            write_row(out / row.replace(" ", "-") / folder, sources.names, pictures)
    figures = {}
    for row, pictures in made.items():
        figures[row] = measures.row(pictures)
        tests = (figures[row][key]["auc"] for key in ("c2st_full", "c2st_fine"))
        log.info("%s, %s: C2ST %.3f, fine band %.3f", name, row, *tests)
    return {"n": len(sources), "real": len(real), "rows": {REAL: measures.real_row()} | figures}


def measure_hair(archive: Path, models: list[Networks], count: int, rows: dict[str, Path], out: Path | None) -> dict:
    """Age whole heads with each model, and compare their hair and brows with real ones."""
    photos = read_aaf(archive, models[0].detector, [HAIR_DIRECTION.sources, HAIR_DIRECTION.real])
    sources, real = choose(photos, HAIR_DIRECTION, count)

    def look(pictures: list[np.ndarray], landmarks: FloatArray) -> dict[str, FloatArray]:
        return hair.colours(hair.head_crops(pictures, landmarks))

    wanted = look(list(real.pictures), real.landmarks)
    made = {NOTHING: list(sources.pictures)}
    targets = np.full(len(sources), HAIR_DIRECTION.target, np.float32)
    for networks in models:
        made[networks.model] = age_pictures(networks, list(sources.pictures), sources.landmarks, targets).pictures
    made |= {row: read_row(path / "heads", sources.names) for row, path in rows.items() if (path / "heads").is_dir()}
    if out is not None:
        for row, pictures in made.items():
            write_row(out / row.replace(" ", "-") / "heads", sources.names, pictures)
    figures = {row: hair.deviations(look(pictures, sources.landmarks), wanted) for row, pictures in made.items()}
    log.info("hair: measured")
    return {"n": len(sources), "real": len(real), "rows": figures}


def _named_folder(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    rows = {}
    for value in values:
        name, _sign, folder = value.partition("=")
        if not folder or not Path(folder).is_dir():
            raise click.BadParameter(f"{value!r} is not NAME=FOLDER of an existing folder")
        rows[name] = Path(folder)
    return rows


@click.command(cls=Script, context_settings={"show_default": True})
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="UTKFace, a tar or a folder.")
@click.option("--teacher", type=click.Path(exists=True, path_type=Path), required=True, help="Tells people apart.")
@click.option("--heads", type=click.Path(exists=True, path_type=Path), help="All-Age-Faces: measure hair and brows.")
@click.option(
    "--fgnet", "people", type=click.Path(exists=True, path_type=Path), help="FG-NET: compare with the person's photos."
)
@click.option("--model", "models", multiple=True, default=BUNDLED_MODELS, help="As `faceage models list` shows.")
@click.option(
    "--row", "rows", multiple=True, metavar="NAME=FOLDER", callback=_named_folder, help="Pictures made elsewhere."
)
@click.option("--faces", "count", type=click.IntRange(10), default=150, help="Faces a direction at most.")
@click.option("--pictures", is_flag=True, help="Write all pictures, a folder a row.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
def main(
    data: Path, teacher: Path, heads: Path | None, people: Path | None, models: tuple[str, ...], rows: dict[str, Path],
    count: int, pictures: bool, out: Path,
) -> None:  # fmt: skip
    """Measure what the eye sees."""
    logging.basicConfig(format="%(relativeCreated)8.0f ms  %(message)s")
    log.setLevel(logging.INFO)
    torch.set_num_threads(1)  # ageing has its own threads; small batches gain nothing from more
    started = perf_counter()
    loaded = [load_networks(model=model) for model in models]
    judge = load_teacher(teacher)
    photos = read_utkface(data, [ages for d in DIRECTIONS.values() for ages in (d.sources, d.real)])
    log.info("%d validation pictures read", len(photos))
    folder = out / "pictures" if pictures else None
    results: dict = {"commit": git_commit(), "directions": {}, "hair": None, "fgnet": {}}
    out.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        results["seconds"] = perf_counter() - started
        (out / "appearance.json").write_text(json.dumps(plain(results), indent=1))
        (out / "appearance.md").write_text(render(results))

    for name in DIRECTIONS:
        results["directions"][name] = measure_direction(name, data, photos, loaded, judge, count, rows, folder)
        write()
    if heads is not None:
        results["hair"] = measure_hair(heads, loaded, count, rows, folder)
        write()
    if people is not None:
        results["fgnet"] = fgnet.measure(people, loaded, judge)
        write()
    click.echo(render(results))


if __name__ == "__main__":
    main()
