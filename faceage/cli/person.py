"""The options that say who in a video is aged, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import click

from faceage.cli.encoding import Time
from faceage.cli.options import AGE, REQUEST_OPTIONS, group
from faceage.pipeline.request import AgeCurve, AgeRequest

KEEP = "keep"


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How the people of a video are aged."""

    everybody: AgeRequest | None
    """Whom `people` does not name; None: they stay as they are."""
    people: Mapping[int, AgeRequest | None]
    """By their numbers in the plan; None: this one stays as they are."""


def _wish(
    age: float | None,
    by: float | None,
    source_age: float | None,
    strength: float,
    faces: Literal["all", "largest"],
    age_curve: AgeCurve | None,
    person: tuple[str, ...],
) -> Wish:
    given = 3 - [age, by, age_curve].count(None)
    if given > 1 or (not given and not person):
        raise click.UsageError(
            "give one of --age N, --by +N and --age-curve TIME:N,TIME:N, or --person for each who is to be aged"
        )

    def request(age: float | None, by: float | None, curve: AgeCurve | None = None) -> AgeRequest:
        return AgeRequest(age=age, by=by, curve=curve, source_age=source_age, strength=strength, faces=faces)

    people: dict[int, AgeRequest | None] = {}
    for text in person:
        number, equals, target = text.partition("=")
        try:
            if not equals or int(number) in people:
                raise ValueError
            if target == KEEP:
                people[int(number)] = None
            elif target[:1] in ("+", "-"):
                people[int(number)] = request(None, float(target))
            else:
                people[int(number)] = request(float(target), None)
        except ValueError as error:
            reason = f" ({error})" if "must be" in str(error) else ""
            raise click.BadParameter(
                f"{text!r} is not NUMBER=AGE, NUMBER=+YEARS or NUMBER=keep, each number once{reason}",
                param_hint="--person",
            ) from error
    return Wish(everybody=request(age, by, age_curve) if given else None, people=people)


class Curve(click.ParamType):
    """Ages at times: "0:30,1:30:70" is 30 years at the start and 70 at a minute and a half."""

    name = "curve"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> AgeCurve:
        """Return the curve."""
        points = []
        for part in str(value).split(","):
            time, colon, age = part.strip().rpartition(":")
            if not colon:
                self.fail(f"{part!r} is not TIME:AGE, e.g. 0:30,1:30:70", param, ctx)
            points.append((Time()(time, param, ctx), AGE(age, param, ctx)))
        try:
            return AgeCurve(tuple(points))
        except ValueError as error:
            self.fail(str(error), param, ctx)


wish_options = group(
    "wish",
    _wish,
    *REQUEST_OPTIONS,
    click.option(
        "--age-curve", type=Curve(), metavar="TIME:AGE,...",
        help="An age that moves in time, in straight lines: 0:30,1:30:70 is 30 at the start and 70 after 1 min 30 s.",
    ),
    click.option(
        "--person", multiple=True, metavar="NUMBER=AGE|+YEARS|keep",
        help="How one person is aged, by the number that `faceage scan` shows; may be repeated. Without --age and --by "
        "all others stay as they are.",
    ),
)  # fmt: skip
