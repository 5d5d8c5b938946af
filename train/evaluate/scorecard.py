"""The scorecard as a document: the headline, the checks of the card itself, and the tables.

All of it is made of the plain results that `train.evaluate` collects and writes as `scorecard.json`. Figures are shown
rounded against the product: an error upwards, a score downwards. Whether a target is met is decided unrounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from train.evaluate.faces import POOLED

NOTHING = "do nothing"
MEAN_1, MEAN_2 = "mean difference x1", "mean difference x2"
OTHER = "another face pasted"
BLUR = "blur"
BLUR_ALL = "blur, of the whole picture"
REAL = "real photos of that age"
REAL_PAIR = "real against real"
CYCLE = "{}, there and back"
PAPER_VERIFIED = {"z0": 0.532, "pixel-wise": 0.598, "identity-preserving": 0.829}
"""Antipov et al. 2017, table 1: share of reconstructions that OpenFace took for the same person."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a model of one architecture is to reach."""

    max_mae_years: float = math.inf
    min_r: float = -math.inf
    min_verified: float = -math.inf
    sharpness: tuple[float, float] = (-math.inf, math.inf)
    max_no_years_codes: float = math.inf
    max_deviation_years: float = math.inf
    max_kid_ratio: float = math.inf
    """Of the first Age-cGAN's on the card; so is the next."""
    max_warp_ratio: float = math.inf


TARGETS = {
    "age-cgan": Targets(
        max_mae_years=10,
        min_r=0.8,
        min_verified=0.9,
        sharpness=(0.9, 1.1),
        max_no_years_codes=0,
        max_deviation_years=2,
    ),
    "facegan": Targets(
        max_mae_years=8,
        min_r=0.85,
        min_verified=0.95,
        sharpness=(0.95, 1.15),
        max_no_years_codes=1,
        max_deviation_years=1.5,
        max_kid_ratio=1,
        max_warp_ratio=0.5,
    ),
}
"""By the model's architecture; one that is not here has none."""

AGE_ERROR = f"age MAE, {POOLED} years"
AGE_ORDER = "r of requested and judged age"
VERIFIED = "verified at 1 % false matches"
SHARP = "sharpness inside the mask, median"
OUTSIDE = "largest change outside the mask, codes"
NO_YEARS = "mean change for no years, codes"
KID_RATIO = "KID, times that of {}"
STEADY = "judged age over a track, deviation in years"
WARP_RATIO = "warp error of the change, times that of {}"

SAME_COSINE = 0.999
"""What the same picture must reach when it is embedded twice: the teacher runs in bfloat16."""
SANE_BIAS_YEARS = 10.0
MAX_STRANGERS_VERIFIED = 0.2
MAX_BLUR_SHARPNESS = 0.8
MIN_JUDGE_R = 0.7
MIN_MEASURED_SHARE = 0.5
MIN_SEEN_SHARE = 0.9
"""Of blurred pictures, those that are seen to be changed outside the mask: a plain background is not."""

Worse = Literal["up", "down", "away", "exact"]


def show(value: float | None, digits: int = 2, worse: Worse = "exact") -> str:
    """Return a figure as text, rounded toward what is worse ("away": from zero), "-" where there is none."""
    if value is None or math.isnan(value):
        return "-"
    scaled = value * 10**digits
    nudge = 1e-6  # 0.29 * 100 is 28.999999999999996
    if worse == "up" or (worse == "away" and value > 0):
        scaled = math.ceil(scaled - nudge)
    elif worse in ("down", "away"):
        scaled = math.floor(scaled + nudge)
    return f"{scaled / 10**digits:.{digits}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share as text, rounded down."""
    text = show(None if share is None else 100 * share, digits, "down")
    return text if text == "-" else f"{text} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its columns padded to be read as text."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def headline(results: dict) -> list[dict]:
    """Return a row a target: what it is, n, the figure of doing nothing, and for each model its figure and limits.

    Where a model has no limit, "low" and "high" are None; "is_met" is None there, and where there is no figure.
    """
    models = results["settings"]["models"]
    age, who, sharp = results["age"][POOLED], results["identity"][POOLED], results["sharpness"]
    outside, kid, video = results["outside"], results["kid"], results["video"]
    n = next(iter(age.values()))["n"]
    reference = next((model for model, facts in models.items() if facts["architecture"] == "age-cgan"), None)

    def row(
        what: str,
        n: int,
        figure: Callable[[str], float],
        limits: Callable[[Targets], tuple[float, float]],
        text: Callable[[float], str],
        nothing: float | None,
    ) -> dict:
        cells = {}
        for model, facts in models.items():
            value, (low, high) = figure(model), limits(TARGETS.get(facts["architecture"], Targets()))
            has_limit = math.isfinite(low) or math.isfinite(high)
            cells[model] = {
                "value": value,
                "low": low if has_limit else None,
                "high": high if has_limit else None,
                "is_met": low <= value <= high if has_limit and not math.isnan(value) else None,
                "target": _target(low, high, text) if has_limit else "",
                "text": text(value),
            }
        return {"what": what, "n": n, "nothing": "-" if nothing is None else text(nothing), "models": cells}

    up, down = partial(show, worse="up"), partial(show, digits=3, worse="down")
    ratio = partial(show, worse="up")
    inf = math.inf
    rows = [
        row(AGE_ERROR, n, lambda m: age[m]["mae"], lambda t: (-inf, t.max_mae_years), up, age[NOTHING]["mae"]),
        row(AGE_ORDER, n, lambda m: age[m]["r"], lambda t: (t.min_r, inf), down, age[NOTHING]["r"]),
        row(
            VERIFIED, n, lambda m: who[m]["verified_1"], lambda t: (t.min_verified, inf), percent,
            who[NOTHING]["verified_1"],
        ),
        row(
            SHARP, n, lambda m: sharp[m]["laplacian"]["median"], lambda t: t.sharpness, _away_from_one,
            sharp[NOTHING]["laplacian"]["median"],
        ),
        row(
            OUTSIDE, next(iter(outside.values()))["n"], lambda m: outside[m]["max"], lambda t: (0, 0),
            partial(show, digits=0, worse="up"), outside[NOTHING]["max"],
        ),
        row(
            NO_YEARS, next(iter(results["no_years"].values()))["n"], lambda m: results["no_years"][m]["mean_codes"],
            lambda t: (-inf, t.max_no_years_codes), up, 0,
        ),
    ]  # fmt: skip
    if reference is not None:
        rows.append(
            row(
                KID_RATIO.format(reference), kid[reference]["n"], lambda m: kid[m]["kid"] / kid[reference]["kid"],
                lambda t: (-inf, t.max_kid_ratio), ratio, kid[NOTHING]["kid"] / kid[reference]["kid"],
            )
        )  # fmt: skip
    if any(video.values()):
        tracks = next(iter(video.values()))
        rows.append(
            row(
                STEADY, len(tracks["tracks"]), lambda m: video[m]["aged_deviation"],
                lambda t: (-inf, t.max_deviation_years), up, tracks["source_deviation"],
            )
        )  # fmt: skip
        if reference is not None:
            rows.append(
                row(
                    WARP_RATIO.format(reference), len(tracks["tracks"]),
                    lambda m: video[m]["warp_error"] / video[reference]["warp_error"],
                    lambda t: (-inf, t.max_warp_ratio), ratio, None,
                )
            )  # fmt: skip
    return rows


def _target(low: float, high: float, text: Callable[[float], str]) -> str:
    if low == high:
        return text(low)
    if math.isinf(low):
        return f"<= {text(high)}"
    return f">= {text(low)}" if math.isinf(high) else f"{text(low)} .. {text(high)}"


def _away_from_one(ratio: float) -> str:
    return show(ratio, 3, "down" if ratio < 1 else "up")


def wrong(results: dict) -> list[str]:
    """Return what shows that the scorecard itself is wrong: rows whose answer is known, and is not what came out."""
    age, who, kid = results["age"], results["identity"], results["kid"]
    counts, judge, sharp = results["counts"], results["judge"], results["sharpness"]
    pooled = who[POOLED]
    found = []

    def must(is_so: bool, what: str) -> None:
        if not is_so:  # so NaN, which compares false, fails
            found.append(what)

    must(counts["measured"] >= MIN_MEASURED_SHARE * counts["requests"],
         f"only {counts['measured']} of {counts['requests']} requests changed the face that was asked for")  # fmt: skip
    must(judge["r"] >= MIN_JUDGE_R, f"the judge's r on real validation faces is {judge['r']:.3f}, below {MIN_JUDGE_R}")
    nothing = pooled[NOTHING]
    must(nothing["cosine_min"] >= SAME_COSINE,
         f"untouched pictures are not themselves: lowest cosine {nothing['cosine_min']:.4f}")  # fmt: skip
    must(nothing["verified_0.1"] == 1 == nothing["verified_1"], "untouched pictures are not all verified")
    for name in ("+20..30", "-20..30"):
        bias, gap = age[name][NOTHING]["bias"], age[name][NOTHING]["mean_gap"]
        must(abs(bias + gap) <= SANE_BIAS_YEARS,
             f"untouched pictures, {name} years: bias {bias:+.1f}, expected about {-gap:+.1f}")  # fmt: skip
        real = age[name][REAL]
        must(abs(real["bias"]) < abs(bias) and real["mae"] < age[name][NOTHING]["mae"],
             f"real photos of the target age, {name} years, score no better than untouched ones")  # fmt: skip
    must(pooled[OTHER]["verified_1"] < MAX_STRANGERS_VERIFIED,
         f"{100 * pooled[OTHER]['verified_1']:.1f} % of pasted strangers are verified")  # fmt: skip
    for kind in ("laplacian", "gradient"):
        must(sharp[BLUR][kind]["median"] < MAX_BLUR_SHARPNESS, f"the {kind} does not see blur")
    must(sharp[NOTHING]["laplacian"]["low"] == 1 == sharp[NOTHING]["laplacian"]["high"], "untouched is not as sharp")
    outside = results["outside"]
    must(outside[NOTHING]["max"] == 0, "untouched pictures are changed outside the mask")
    must(
        outside[BLUR_ALL]["changed"] >= MIN_SEEN_SHARE * outside[BLUR_ALL]["n"], "changes outside the mask are not seen"
    )
    must(kid[BLUR]["kid"] > kid[NOTHING]["kid"],
         f"blur's KID {kid[BLUR]['kid']:.4g} is no worse than doing nothing's {kid[NOTHING]['kid']:.4g}")  # fmt: skip
    must(
        kid[REAL_PAIR]["kid"] < kid[NOTHING]["kid"],
        "real pictures of the right age have no lower KID than untouched ones",
    )
    return found


def render(results: dict) -> str:
    """Return the scorecard as Markdown."""
    parts = [
        "# Scorecard",
        _settings(results),
        "## Headline",
        _headline(results),
        _wrong(results),
        "## 1. Age",
        *_age(results),
        "## 2. Identity",
        *_identity(results),
        "## 3. Reconstructions (the Age-cGAN paper's table)",
        *_latent(results),
        "## 4. Pictures",
        *_pictures(results),
        f"## 5. Slices, {POOLED} years",
        *_slices(results),
        "## 6. Video",
        *_video(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _settings(results: dict) -> str:
    counts, settings = results["counts"], results["settings"]
    models = "; ".join(
        f"`{model}` ({', '.join(f'{role} `{digest}`' for role, digest in facts['files'].items())})"
        for model, facts in settings["models"].items()
    )
    misread = " and ".join(show(years, 2, "up") for years in counts["source_mae"].values())
    return (
        f"Models {models}; seed {settings['seed']}; {counts['faces']} validation faces, "
        f"{counts['requests']} requests, each face to its label ±10, 20, 30, 40 years within 15..80. In "
        f"{counts['not_found']} requests the product did not find the face, in {counts['left_alone']} it left it alone "
        f"(a profile, or a doubt): these are left out of **every** row, which leaves n = {counts['measured']}, "
        f"{counts['in_part']} of them aged in part only. A face counts up to eight times in n. The product reads the "
        f"present ages of these faces itself, wrong by {misread} years in the mean. "
        f"Judged by {', '.join(f'{name} `{digest}`' for name, digest in settings['judges'].items())}; code at "
        f"{settings['commit'] or 'no commit'}; {settings['seconds']:.0f} s. "
        "All figures are rounded to the product's disadvantage."
    )


def _headline(results: dict) -> str:
    words = {True: "met", False: "**not met**", None: "not measured"}
    header = ["what"]
    for model in results["settings"]["models"]:
        header += [model, "target", ""]
    rows = []
    for row in results["headline"]:
        cells = [row["what"]]
        for cell in row["models"].values():
            cells += [cell["text"], cell["target"], words[cell["is_met"]] if cell["target"] else ""]
        rows.append([*cells, row["nothing"], str(row["n"])])
    return table([*header, NOTHING, "n"], rows)


def _wrong(results: dict) -> str:
    failed = results["wrong"]
    if not failed:
        return "The card's own checks (rows whose answer is known beforehand) all passed."
    return "**The scorecard is wrong**, none of it counts:\n\n" + "\n".join(f"- {what}" for what in failed)


def _age(results: dict) -> list[str]:
    judge, age, models = results["judge"], results["age"], results["settings"]["models"]
    methods = (*models, NOTHING, MEAN_1, MEAN_2, REAL)
    figures: tuple[tuple[str, str, int, Worse], ...] = (
        ("mae", "Mean absolute error, years", 2, "up"),
        ("bias", "Bias (judged - requested), years", 2, "away"),
        ("r", "Pearson's r of requested and judged age", 3, "down"),
    )
    parts = [
        f"The judge on real validation faces of 15 to 85 years: n = {judge['n']}, MAE {show(judge['mae'], 2, 'up')} "
        f"years, bias {show(judge['bias'], 2, 'away')}, r {show(judge['r'], 3, 'down')}. What real "
        "photos of the target age miss in the tables is the judge's own error."
    ]
    for key, title, digits, worse in figures:
        rows = [
            (gap, str(by[NOTHING]["n"]), *(show(by[m][key], digits, worse) for m in methods)) for gap, by in age.items()
        ]
        parts.append(f"{title}:\n\n" + table(("years", "n", *methods), rows))
    for model, gaps in (results["fooled"] or {}).items():
        rows = [
            (gap, str(f["n"]), *(show(f[k], 2, "exact") for k in ("composites", "untouched", "fooled")))
            for gap, f in gaps.items()
        ]
        parts.append(
            f"How far the loss's estimators are fooled by {model}: their mean reading less the judge's, years; the "
            "last column is the difference, in the direction that was asked for:\n\n"
            + table(("years", "n", "composites", "untouched", "fooled by"), rows)
        )
    return parts


def _identity(results: dict) -> list[str]:
    limits, identity = results["thresholds"], results["identity"]

    def cells(figures: dict) -> tuple[str, ...]:
        rates = (percent(figures[key]) for key in ("verified_0.1", "verified_1"))
        return (str(figures["n"]), show(figures["cosine"], 3, "down"), *rates)

    header = ("n", "mean cosine", "verified at 0.1 %", "verified at 1 %")
    rows = [(method, *cells(figures)) for method, figures in identity[POOLED].items()]
    cycle, strangers = results["cycle"], identity[POOLED][OTHER]
    rows += [(f"{CYCLE.format(model)}, ±30", *cells(figures)) for model, figures in cycle.items()]
    errors = ", ".join(f"{show(figures['mae_codes'], 2, 'up')} ({model})" for model, figures in cycle.items())
    return [
        f"The teacher's cosine to the untouched picture. {limits['pairs']} pairs of different validation pictures "
        f"(15 years and older, n = {limits['n']}) exceed {limits['0.1']:.4f} in 0.1 % and {limits['1']:.4f} in 1 % of "
        "cases.",
        f"{POOLED} years:\n\n" + table(("", *header), rows),
        f"A stranger's face in this person's hair and pose is verified in {percent(strangers['verified_0.1'])} and "
        f"{percent(strangers['verified_1'])} of cases: for composites, the thresholds let so much pass.",
        f"There and back, the mean absolute error inside the mask is, in codes of 255: {errors}.",
        *(
            f"{model}, gap by gap:\n\n"
            + table(("years", *header), [(gap, *cells(by[model])) for gap, by in identity.items()])
            for model in results["settings"]["models"]
        ),
    ]


def _latent(results: dict) -> list[str]:
    parts = []
    for model, latent in results["latent"].items():
        if latent is None:
            parts.append(f"{model} has no latents.")
            continue
        rows = [
            (name, str(f["n"]), show(f["cosine"], 3, "down"), percent(f["verified_0.1"]), percent(f["verified_1"]),
             percent(PAPER_VERIFIED.get(name)))
            for name, f in latent.items()
        ]  # fmt: skip
        header = ("latent", "n", "mean cosine", "verified at 0.1 %", "verified at 1 %", "the paper")
        parts.append(
            f"{model}: generated faces at the label's age against the untouched picture at full resolution. The "
            "paper's judge is OpenFace at its own threshold, on IMDB-Wiki: its column is a mark, not a rival.\n\n"
            + table(header, rows)
        )
    return parts


def _pictures(results: dict) -> list[str]:
    sets = results["kid_sets"]
    kid = [(method, str(f["n"]), show(f["kid"], 4, "up")) for method, f in results["kid"].items()]
    sharp = [
        (method, str(f["n"]), *(_range(f[kind]) for kind in ("laplacian", "gradient")))
        for method, f in results["sharpness"].items()
    ]
    outside = [(m, str(f["n"]), str(f["changed"]), str(f["max"])) for m, f in results["outside"].items()]
    no_years = [
        (model, str(f["n"]), show(f["mean_codes"], 3, "up"), show(f["max_codes"], 2, "up"))
        for model, f in results["no_years"].items()
    ]
    return [
        f"KID by the judge's features, {POOLED} years, the mean over the target's age groups weighted by n, against "
        f"{sets['real']} {sets['which']}; real against real: those and {sets['other']} validation pictures of the same "
        "age groups.\n\n" + table(("", "n", "KID"), kid),
        f"Sharpness inside the mask, composite / original, {POOLED} years, full resolution: median (5 % .. 95 %):\n\n"
        + table(("", "n", "RMS Laplacian", "mean gradient"), sharp),
        "Outside the mask, all requests, or all drawn faces:\n\n"
        + table(("", "n", "pictures changed", "largest change, codes"), outside),
        "Faces aged to the age that they are said to have, the mean absolute change inside the mask, codes:\n\n"
        + table(("", "n", "mean", "of the face that changed most"), no_years),
    ]


def _range(figures: dict) -> str:
    return f"{show(figures['median'], 3)} ({show(figures['low'], 3)} .. {show(figures['high'], 3)})"


def _slices(results: dict) -> list[str]:
    parts = []
    for model, slices in results["slices"].items():
        rows = [
            (
                s["by"],
                s["slice"],
                str(s["n"]),
                show(s["mae"], 2, "up"),
                show(s["bias"], 2, "away"),
                percent(s["verified_1"]),
            )
            for s in slices["rows"]
        ]
        parts += [
            f"{model}:\n\n" + table(("by", "slice", "n", "MAE", "bias", "verified at 1 %"), rows),
            slices["line"],
        ]
    return parts


def _video(results: dict) -> list[str]:
    columns: tuple[tuple[str, str, int, Worse], ...] = (
        ("eyes_px", "eyes, px", 0, "exact"),
        ("n", "n", 0, "exact"),
        ("source_age", "judged before", 1, "exact"),
        ("aged_age", "after", 1, "exact"),
        ("source_deviation", "deviation before", 2, "down"),
        ("aged_deviation", "after", 2, "up"),
        ("change_deviation", "of the change", 2, "up"),
        ("warp_error", "warp error", 3, "up"),
        ("jitter_measured", "jitter measured", 4, "down"),
        ("jitter_smoothed", "smoothed", 4, "up"),
    )
    header = ("clip", "track", *(title for _, title, _, _ in columns))
    parts = []
    for model, video in results["video"].items():
        if video is None:
            return ["No clips were given."]
        rows = [
            (t["clip"], str(t["track"]), *(show(t[key], digits, worse) for key, _, digits, worse in columns))
            for t in video["tracks"]
        ]
        parts.append(
            f"{model}, everybody {video['by']:+g} years, losslessly encoded; {video['left_out']} tracks aged in full "
            "for too few frames are left out:\n\n" + table(header, rows)
        )
    return [
        *parts,
        "Deviation: of the judged age over the n frames of a track, years; of the change: of the judged age after less "
        "before, frame by frame. Warp error: what of the change does not move with the source's optical flow, as a "
        "share of the change. Jitter: RMS second difference of the landmarks in eye distances, true motion included.",
    ]


def plain(value: object) -> object:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_sheet(
    path: Path, rows: Sequence[Sequence[np.ndarray]], columns: Sequence[str], labels: Sequence[str]
) -> None:
    """Write pictures, uint8 [H, W, 3] RGB, as a PNG of rows and columns, with a label on each row's first picture."""
    font, strips = cv2.FONT_HERSHEY_SIMPLEX, []
    for row, label in zip(rows, labels, strict=True):
        strip = np.concatenate(row, 1)
        for gray, width in ((0, 3), (255, 1)):
            cv2.putText(strip, label, (4, strip.shape[0] - 6), font, 0.45, (gray,) * 3, width, cv2.LINE_AA)
        strips.append(strip)
    head = np.full((28, strips[0].shape[1], 3), 255, np.uint8)
    for i, text in enumerate(columns):
        cv2.putText(head, text, (i * rows[0][0].shape[1] + 8, 20), font, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    cv2.imwrite(str(path), np.concatenate([head, *strips])[:, :, ::-1])
