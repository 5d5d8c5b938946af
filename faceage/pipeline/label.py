"""The label of an output: it is partly synthetic, made by this tool and this model, of somebody at that age."""

from __future__ import annotations

from collections.abc import Mapping

from faceage import __version__
from faceage.ages import OLDEST_YEARS
from faceage.media.xmp import SOURCE_TYPE
from faceage.pipeline.request import AgeRequest, Networks


def label_fields(networks: Networks, target_age: str) -> dict[str, str]:
    """Return what a label says beside the kind of source: the tool, the model and its checkpoint, the wanted age."""
    generator = networks.fingerprints["generator"][:12]
    return {
        "tool": f"faceage {__version__}",
        "model": f"{networks.model} sha256:{generator}",
        "target_age": target_age,
    }


def describe_request(request: AgeRequest) -> str:
    """Return the wanted age as a label says it: "70", "+20 years", "30 at 0 s, 70 at 90 s"."""
    if request.curve is not None:
        return ", ".join(f"{min(age, OLDEST_YEARS):g} at {time:g} s" for time, age in request.curve.points)
    return f"{request.by:+g} years" if request.age is None else f"{min(request.age, OLDEST_YEARS):g}"


def describe_people(everybody: AgeRequest | None, people: Mapping[int, AgeRequest | None]) -> str:
    """Return what is wanted of the people of a video as a label says it: "70, person 3 kept"."""
    parts = [] if everybody is None else [describe_request(everybody)]
    for number, request in people.items():
        parts.append(f"person {number} {'kept' if request is None else describe_request(request)}")
    return ", ".join(parts)


def label_comment(existing: str | None, label: Mapping[str, str]) -> str:
    """Return the label as a container's comment, after the comment that the source has."""
    text = f"digitalSourceType: {SOURCE_TYPE}; " + "; ".join(f"{k}: {v}" for k, v in label.items())
    return f"{existing}\n{text}" if existing else text
