"""The scorecard as a document: the headline, the checks of the card itself, and the tables.

All of it is made of the plain results that `train.evaluate` collects and writes as `scorecard.json`. Figures are shown
rounded against the product: an error upwards, a score downwards. Whether a target is met is decided unrounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from train.evaluate_faces import POOLED

MODEL = "the model"
NOTHING = "do nothing"
MEAN_1, MEAN_2 = "mean difference x1", "mean difference x2"
OTHER = "another face pasted"
BLUR = "blur"
BLUR_ALL = "blur, of the whole picture"
REAL = "real photos of that age"
REAL_PAIR = "real against real"
CYCLE = "the model, there and back"
PAPER_VERIFIED = {"z0": 0.532, "pixel-wise": 0.598, "identity-preserving": 0.829}
"""Antipov et al. 2017, table 1: share of reconstructions that OpenFace took for the same person."""

MAX_MAE_YEARS = 10.0
MIN_R = 0.8
MIN_VERIFIED = 0.9
SHARPNESS = (0.9, 1.1)
MAX_DEVIATION_YEARS = 2.0

AGE_ERROR = f"age MAE, {POOLED} years"
AGE_ORDER = "r of requested and judged age"
VERIFIED = "verified at 1 % false matches"
SHARP = "sharpness inside the mask, median"
OUTSIDE = "largest change outside the mask, codes"
STEADY = "judged age over a track, deviation in years"

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
    """Return a row a target: its limits, the figures of the model and of doing nothing, n, and whether it is met."""
    age, who, sharp = results["age"][POOLED], results["identity"][POOLED], results["sharpness"]
    outside, video = results["outside"], results["video"]
    n, inf = age[MODEL]["n"], math.inf

    def row(what: str, low: float, high: float, n: int, values: dict[str, float], text: Callable[[float], str]) -> dict:
        value = values[MODEL]
        is_met = None if math.isnan(value) else low <= value <= high
        shown = {"target": _target(low, high, text), "text": text(value), "nothing": text(values[NOTHING])}
        return {"what": what, "low": low, "high": high, "n": n, "value": value, "is_met": is_met} | shown

    def both(figures: dict, *keys: str) -> dict[str, float]:
        found = {}
        for method in (MODEL, NOTHING):
            found[method] = figures[method]
            for key in keys:
                found[method] = found[method][key]
        return found

    rows = [
        row(AGE_ERROR, -inf, MAX_MAE_YEARS, n, both(age, "mae"), partial(show, worse="up")),
        row(AGE_ORDER, MIN_R, inf, n, both(age, "r"), partial(show, digits=3, worse="down")),
        row(VERIFIED, MIN_VERIFIED, inf, n, both(who, "verified_1"), percent),
        row(SHARP, *SHARPNESS, n, both(sharp, "laplacian", "median"), _away_from_one),
        row(OUTSIDE, 0, 0, outside[MODEL]["n"], both(outside, "max"), partial(show, digits=0, worse="up")),
    ]
    if video is not None:
        steady = {MODEL: video["aged_deviation"], NOTHING: video["source_deviation"]}
        count = len(video["tracks"])
        rows.append(row(STEADY, -inf, MAX_DEVIATION_YEARS, count, steady, partial(show, worse="up")))
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
        _latent(results),
        "## 4. Pictures",
        *_pictures(results),
        f"## 5. Slices, {POOLED} years",
        *_slices(results),
        "## 6. Video",
        _video(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _settings(results: dict) -> str:
    counts, settings = results["counts"], results["settings"]
    files = ", ".join(f"{role} `{digest}`" for role, digest in settings["files"].items())
    return (
        f"Model `{settings['model']}` ({files}); seed {settings['seed']}; {counts['faces']} validation faces, "
        f"{counts['requests']} requests, each face to its label ±10, 20, 30, 40 years within 15..80. In "
        f"{counts['not_found']} requests the product did not find the face, in {counts['left_alone']} it left it alone "
        f"(a profile, or a doubt): these are left out of **every** row, which leaves n = {counts['measured']}, "
        f"{counts['in_part']} of them aged in part only. A face counts up to eight times in n. The product reads the "
        f"present ages of these faces itself, wrong by {show(counts['source_mae'], 2, 'up')} years in the mean. "
        f"Judged by {', '.join(f'{name} `{digest}`' for name, digest in settings['judges'].items())}; code at "
        f"{settings['commit'] or 'no commit'}; {settings['seconds']:.0f} s. "
        "All figures are rounded to the product's disadvantage."
    )


def _headline(results: dict) -> str:
    words = {True: "met", False: "**not met**", None: "not measured"}
    rows = [
        (r["what"], r["target"], r["text"], words[r["is_met"]], r["nothing"], str(r["n"])) for r in results["headline"]
    ]
    return table(("what", "target", MODEL, "", NOTHING, "n"), rows)


def _wrong(results: dict) -> str:
    failed = results["wrong"]
    if not failed:
        return "The card's own checks (rows whose answer is known beforehand) all passed."
    return "**The scorecard is wrong**, none of it counts:\n\n" + "\n".join(f"- {what}" for what in failed)


def _age(results: dict) -> list[str]:
    judge, age = results["judge"], results["age"]
    methods = (MODEL, NOTHING, MEAN_1, MEAN_2, REAL)
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
            (gap, str(by[MODEL]["n"]), *(show(by[m][key], digits, worse) for m in methods)) for gap, by in age.items()
        ]
        parts.append(f"{title}:\n\n" + table(("years", "n", *methods), rows))
    if results["fooled"]:
        rows = [
            (gap, str(f["n"]), *(show(f[k], 2, "exact") for k in ("composites", "untouched", "fooled")))
            for gap, f in results["fooled"].items()
        ]
        parts.append(
            "How far the loss's estimators are fooled: their mean reading less the judge's, years; the last column is "
            "the difference, in the direction that was asked for:\n\n"
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
    rows.append((f"{CYCLE}, ±30", *cells(cycle)))
    return [
        f"The teacher's cosine to the untouched picture. {limits['pairs']} pairs of different validation pictures "
        f"(15 years and older, n = {limits['n']}) exceed {limits['0.1']:.4f} in 0.1 % and {limits['1']:.4f} in 1 % of "
        "cases.",
        f"{POOLED} years:\n\n" + table(("", *header), rows),
        f"A stranger's face in this person's hair and pose is verified in {percent(strangers['verified_0.1'])} and "
        f"{percent(strangers['verified_1'])} of cases: for composites, the thresholds let so much pass.",
        f"There and back, the mean absolute error inside the mask is {show(cycle['mae_codes'], 2, 'up')} codes of 255.",
        f"{MODEL.capitalize()}, gap by gap:\n\n"
        + table(("years", *header), [(gap, *cells(by[MODEL])) for gap, by in identity.items()]),
    ]


def _latent(results: dict) -> str:
    latent = results["latent"]
    if latent is None:
        return "This model has no latents."
    rows = [
        (name, str(f["n"]), show(f["cosine"], 3, "down"), percent(f["verified_0.1"]), percent(f["verified_1"]),
         percent(PAPER_VERIFIED.get(name)))
        for name, f in latent.items()
    ]  # fmt: skip
    header = ("latent", "n", "mean cosine", "verified at 0.1 %", "verified at 1 %", "the paper")
    return (
        "Generated faces at the label's age against the untouched picture at full resolution. The paper's judge is "
        "OpenFace at its own threshold, on IMDB-Wiki: its column is a mark, not a rival.\n\n" + table(header, rows)
    )


def _pictures(results: dict) -> list[str]:
    sets = results["kid_sets"]
    kid = [(method, str(f["n"]), show(f["kid"], 4, "up")) for method, f in results["kid"].items()]
    sharp = [
        (method, str(f["n"]), *(_range(f[kind]) for kind in ("laplacian", "gradient")))
        for method, f in results["sharpness"].items()
    ]
    outside = [(m, str(f["n"]), str(f["changed"]), str(f["max"])) for m, f in results["outside"].items()]
    return [
        f"KID by the judge's features, {POOLED} years, the mean over the target's age groups weighted by n, against "
        f"{sets['real']} {sets['which']}; real against real: those and {sets['other']} validation pictures of the same "
        "age groups.\n\n" + table(("", "n", "KID"), kid),
        f"Sharpness inside the mask, composite / original, {POOLED} years, full resolution: median (5 % .. 95 %):\n\n"
        + table(("", "n", "RMS Laplacian", "mean gradient"), sharp),
        "Outside the mask, all requests, or all drawn faces:\n\n"
        + table(("", "n", "pictures changed", "largest change, codes"), outside),
    ]


def _range(figures: dict) -> str:
    return f"{show(figures['median'], 3)} ({show(figures['low'], 3)} .. {show(figures['high'], 3)})"


def _slices(results: dict) -> list[str]:
    slices = results["slices"]
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
    return [
        table(("by", "slice", "n", "MAE", "bias", "verified at 1 %"), rows),
        slices["line"],
    ]


def _video(results: dict) -> str:
    video = results["video"]
    if video is None:
        return "No clips were given."
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
    rows = [
        (t["clip"], str(t["track"]), *(show(t[key], digits, worse) for key, _, digits, worse in columns))
        for t in video["tracks"]
    ]
    header = ("clip", "track", *(title for _, title, _, _ in columns))
    return (
        f"Everybody {video['by']:+g} years, losslessly encoded; {video['left_out']} tracks aged in full for too few "
        "frames are left out. Deviation: of the judged age over the n frames of a track, years; of the change: of the "
        "judged age after less before, frame by frame. Warp error: what of "
        "the change does not move with the source's optical flow, as a share of the change. Jitter: RMS second "
        "difference of the landmarks in eye distances, true motion included.\n\n" + table(header, rows)
    )


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
