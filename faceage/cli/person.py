"""The options that say who in a video is aged, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import click

from faceage.cli.options import REQUEST_OPTIONS, group
from faceage.pipeline.request import AgeRequest

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
    person: tuple[str, ...],
) -> Wish:
    if (age is not None and by is not None) or (age is None and by is None and not person):
        raise click.UsageError("give either --age N or --by +N, or --person for each who is to be aged")

    def request(age: float | None, by: float | None) -> AgeRequest:
        return AgeRequest(age=age, by=by, source_age=source_age, strength=strength, faces=faces)

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
    return Wish(everybody=None if age is None and by is None else request(age, by), people=people)


wish_options = group(
    "wish",
    _wish,
    *REQUEST_OPTIONS,
    click.option(
        "--person", multiple=True, metavar="NUMBER=AGE|+YEARS|keep",
        help="How one person is aged, by the number that `faceage scan` shows; may be repeated. Without --age and --by "
        "all others stay as they are.",
    ),
)  # fmt: skip
