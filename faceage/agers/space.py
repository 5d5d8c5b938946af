"""The space model: the change lives in the face's own space and is drawn at the picture's own resolution.

What age changes is stored on one canonical face: prototypes (how the mean face of each age differs, at the light, the
colours and the appearance of the person) and wrinkles (creases of real old faces). Once a person and shot they are
mixed to one canonical change. At key frames a small network says where each pixel of the crop lies on the canonical
face; in every frame the change is read there, and scales the luma of the picture. Wrinkles are thus as sharp as they
are stored, the same in the whole shot, and stay on the skin. Young skin gets less of its own fine detail. What only
the very face can tell, where it folds and sags, is drawn on it at key frames: by a network that was taught by real old
skin (`train.space.older`), whose drawings are averaged over key frames; for younger faces by FaceGAN's
(`agers.facegan`). Hair is found by another network in a wider crop and turns grey strand by strand (`agers.hair`).

Reference: Burt and Perrett, Proc. R. Soc. B 1995 (prototypes); Tiddeman, Burt, Perrett, IEEE CG&A 2001 (means lose
wrinkles); Kemelmacher-Shlizerman, Suwajanakorn, Seitz, CVPR 2014 (relit, densely aligned); Güler et al., CVPR 2017
(dense coordinates).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from faceage.agers.base import Ages, Architecture, EngineOf, ModelFiles, read_view
from faceage.agers.canonical import CANONICAL_PX, CanonicalModel, colour_share, limit, read_canonical
from faceage.agers.facegan import FaceGAN, unet_program
from faceage.agers.hair import BROW_GREY, HairKey, add_hair, draw_hair, find_brows, find_hair, grey_amount
from faceage.agers.programs import EXAMPLES, graph_of, load_network
from faceage.checkpoint import read_header
from faceage.engines.base import BATCH, Engine, Program, TensorSpec
from faceage.engines.examples import example_faces
from faceage.geometry import TEMPLATES, apply_affine, face_mask, similarity_to_template, template_5
from faceage.kernels import BLACK_OFFSET, RGB_LUMA, beside, maps, settle
from faceage.types import Appearance, Change, Crops, FloatArray, Frame, Rect, Samples, View, enclosing

if TYPE_CHECKING:
    from torch import nn

FACE_SIZES_PX = (128, 256)
HEAD_SIZES_PX = (160, 320)
SHARP, BLURRED, BLUR_SIGMA = 0.22, 0.17, 0.0125
"""Fineness (see `_fineness`) of a face from which on creases are drawn as they are, that at which they are blurred in
full, and the blur's width in sides of the crop: sharp creases on a blurred face would be seen at once."""
BRIGHT = (0.75, 0.95)
"""Luma above which a face is brightened less than the change says, then not at all: skin would turn white."""
MIN_BLUR_PX, BLUR_REACH = 0.3, 4
"""Blurs that are narrower are left out; how far they reach, in their widths."""
COLOUR_PX = 32
"""Side of the map of the face's own colours, which chroma changes follow."""
UNCOVERED_PX = 64
"""Side of the map of what of the face no hair covers."""
YOUNGER_PX, YOUNGER_SHARE = 128, 0.4
"""Side of the crop in which FaceGAN draws its change of younger faces, and the share of it that they get."""
DRAWN_YEARS = (60.0, 88.0)
"""Ages at which the network draws older faces, for the real ones that it learned from have these; to be younger than
that, a face gets a part of it."""
DRAWN_REACH_YEARS, DRAWN_REACH_OVER_YEARS = 11.0, 25.0
"""It draws ages this far beyond the wanted one, less for small steps: what it is sure of is milder than most faces."""
DRAWN_GAIN, CLOSE_GAIN, DRAWN_CHROMA, DRAWN_LIMITS = 1.05, 1.3, 1.0, (0.5, 0.22)
"""What its changes of luma are multiplied by, in close-ups (`CLOSE_PX`), which have more detail than it can draw, and
those of chroma; and the limits of luma's, as log ratios."""
CLOSE_SIGMA = 0.8
"""Width in its pixels of the blur under which it sees close-ups: it learned from pictures of small faces. On sharper
ones it draws less, and more of that is spots."""
EVEN_PX, EVEN_SIGMA, EVEN_SHARE = 32, 0.5, 0.35
"""Side of the maps of what is wide in its changes, the blur's width in their pixels, and the share of the difference
between both halves of the face that each half comes nearer to the other: at 0.5 they are alike."""
STEADY_KEYS = 2
"""Key frames before one whose drawings are averaged with its own: a part of each is chance, and would come and go as
patches of shade. From key frame to key frame what is drawn on a talking head differs by 0.8, 0.65, 0.47, 0.32 and 0.2
of what it is, from the finest band to the widest; means of three differ by 0.6 of that."""
STEADY_ALIKE = 0.1
"""Difference of luma between two pictures of a place on the face at which its drawing in the other counts 1/e as much:
a mouth that has opened and light that has changed have no part in it."""
STEADY_GAIN = 1.4
"""The most that fine detail of such a mean is multiplied by, to be as strong as it was drawn."""
CANONICAL_CROPS = 1 / 1.2
"""Sides of the crop that the side of the canonical picture spans; as `train.space.canonical.ENLARGE`."""
SMOOTH_SIGMA, SMOOTH_RANGE = 0.022, 0.14
"""Fine detail of skin is what this bilateral filter takes away: its width in sides of the crop, and in luma."""
CLOSE_PX = (260, 400)
"""Side of a face's crop in pixels of the frame from which on, and from which on in full, it is a close-up: the pictures
that creases are from are smaller and have lost their sharpness."""
CRISP_SIGMA, CRISP_DARKER, CRISP_BRIGHTER = 4.0, 1.3, 0.3
"""How wide the detail is that gets stronger there, in canonical pixels, and by how much what of it is dark, and what is
bright, which soon looks like wax."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was decided for one person: the canonical change, and how grey the hair gets."""

    tone: Samples
    """float32 [256, 256, 4], as `CanonicalModel.mix` returns it."""
    crisp: Samples | None
    """float32 [256, 256], log ratio of luma that makes creases as sharp as close-ups show them; None for
    younger faces."""
    grey: float
    """0 to 1."""
    colour: float
    """How much of a change of colour the face gets, see `canonical.colour_share`."""
    ages: Ages


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What the network drew on a face at one key frame, and what tells where that belongs at another."""

    change: Samples
    """float32 [P, P, 3], the first channels of `Look.tone`."""
    coordinates: Samples
    """As `FaceKey.coordinates`."""
    luma: Samples
    """float32 [32, 32], of the face itself, in [0, 1]."""

    def moved_to(self, face: Drawing) -> tuple[Samples, Samples]:
        """Return the change where another key frame has the face [P, P, 3], and how much it counts there [P, P].

        The crops are aligned by five landmarks. What is left is to first order the difference of the coordinates.
        """
        offset = (face.coordinates - self.coordinates) * (CANONICAL_CROPS / CANONICAL_PX)
        change, luma = (_read_off(each, offset) for each in (self.change, self.luma))
        unlike = maps.mean_around(abs(luma - face.luma), 3) / STEADY_ALIKE
        side = len(change)
        return change, maps.resize(maps.exp(-(unlike**2)), side, side)


@dataclass(frozen=True, kw_only=True)
class FaceKey:
    """What was seen of one face at a key frame."""

    size_px: int
    """S, the side of the crop in which the change is drawn."""
    part: Rect
    """The pixels of the crop in which the face is, or all; their edges lie between cells of all maps."""
    coordinates: Samples
    """float32 [M, M, 2], canonical pixels."""
    colours: Samples
    """float32 [32, 32, 3], RGB in [0, 1]."""
    smooth: Samples | None
    """float32 [S, S], luma in [0, 1] without fine detail; None where that stays as it is."""
    close: float
    """How near it is seen, 0 to 1."""
    younger: Samples | None
    """float32 [128, 128], added to luma in [0, 1]; None where it is not to get younger."""
    older: Samples | None
    """float32 [P, P, 4], added to `Look.tone`; None where it is not to get older."""
    drawings: tuple[Drawing, ...]
    """Those that `older` is the mean of, the newest first. They stay where they were drawn."""
    blur: maps.Number
    """Width of the blur that creases get, in sides of the crop."""
    uncovered: Samples | None
    """float32 [64, 64], 1 where no hair covers the face; None: not looked for."""
    hair: HairKey | None
    brows: HairKey | None


class SpaceAger:
    """The space model (`base.Ager`) over its two networks and its canonical parameters."""

    needs_appearance = True
    warm_up_keys = STEADY_KEYS

    def __init__(
        self,
        *,
        coordinates: Engine,
        hair: Engine | None,
        younger: FaceGAN,
        older: Callable[[], Engine],
        older_view: View,
        canonical: CanonicalModel,
        views: tuple[View, ...],
    ) -> None:
        """Use engines of `_programs`.

        Args:
            coordinates: (faces [F, 3, S, S], landmarks [F, 10] as fractions of the crop) -> coordinates
                [F, 2, M, M], fractions of the canonical picture.
            hair: heads [F, 3, S, S] -> logits of hair [F, 1, S/2, S/2]; None: hair keeps its colour.
            younger: draws what makes this very face younger.
            older: returns the engine (faces [F, 3, P, P], ages now [F], wanted ages [F]) -> log ratios [F, 3, P, P].
            older_view: of its crops, of one size P.
            canonical: what age changes.
            views: the face's, and the head's where there is a hair network.
        """
        self._coordinates, self._hair, self._canonical = coordinates, hair, canonical
        self._younger, self._older, self._older_view = younger, older, older_view
        self._canonical_on: dict[str, CanonicalModel] = {}
        self.views = views

    def look(
        self,
        appearances: Sequence[Appearance],
        source_age: FloatArray,
        target_age: FloatArray,
        home: Frame | Samples | None = None,
    ) -> list[Look]:
        """Mix each person's canonical change; see `base.Ager.look`."""
        canonical, looks = self._canonical_beside(home), []
        for appearance, source, target in zip(appearances, source_age, target_age, strict=True):
            tone = canonical.mix(appearance, float(source), float(target))
            ages = Ages(float(source), float(target))
            looks.append(
                Look(
                    tone=tone,
                    crisp=_crisp(tone) if target > source else None,
                    grey=grey_amount(*ages),
                    colour=colour_share(appearance.thumbnail),
                    ages=ages,
                )
            )
        return looks

    def _canonical_beside(self, home: Frame | Samples | None) -> CanonicalModel:
        """Return the canonical model with its maps where frames or samples live, to which they are brought once."""
        samples = home.planes[0] if isinstance(home, Frame) else home
        if samples is None or isinstance(samples, np.ndarray):
            return self._canonical
        device = str(samples.device)
        if device not in self._canonical_on:
            there = self._canonical.maps_beside(samples)
            settle(there.wrinkles)
            self._canonical_on[device] = there
        return self._canonical_on[device]

    def observe(
        self, looks: Sequence[Look], crops: Sequence[Crops], previous: Sequence[FaceKey | None]
    ) -> list[FaceKey]:
        """Find coordinates, colours and hair; see `base.Ager.observe`."""
        faces = crops[0]
        landmarks = ((faces.landmarks + 0.5) / faces.size_px).astype(np.float32).reshape(-1, 10)
        small = _reduce(faces.pixels, self.views[0].sizes_px[0])
        (fractions,) = self._coordinates(small, beside(small, landmarks))
        hair: list[HairKey | None] = [None] * len(faces)
        if self._hair is not None:
            (logits,) = self._hair(_reduce(crops[1].pixels, self.views[1].sizes_px[0]))
            hair = [
                find_hair(pixels, logit[0], look.grey)
                for pixels, logit, look in zip(crops[1].pixels, logits, looks, strict=True)
            ]
        keys = []
        younger, older = self._draw_younger(looks, faces), self._draw_older(looks, faces)
        for look, pixels, face, where, found, near, bright, folded, last in zip(
            looks, faces.pixels, small, fractions, hair, _close(faces), younger, older, previous, strict=True
        ):
            coordinates = maps.by_pixels(where) * CANONICAL_PX - 0.5
            rgb = (maps.by_pixels(pixels) + 1) / 2
            luma = maps.luma_of(rgb)
            colours = maps.shrink(rgb, COLOUR_PX)
            smooth = _smooth(luma) if look.ages.target < look.ages.source else None
            drawings: tuple[Drawing, ...] = ()
            if folded is not None:
                change = self._on_face(folded, coordinates)
                drawing = Drawing(change=change, coordinates=coordinates, luma=maps.luma_of(colours))
                drawings = (drawing, *(last.drawings[:STEADY_KEYS] if last is not None else ()))
            keys.append(
                FaceKey(
                    size_px=faces.size_px,
                    part=self._part(coordinates, faces.size_px, is_whole=bright is not None),
                    coordinates=coordinates,
                    colours=colours,
                    blur=BLUR_SIGMA * maps.limit((SHARP - _fineness(face)) / (SHARP - BLURRED), 0, 1),
                    smooth=smooth,
                    close=float(near),
                    younger=bright,
                    older=_with_no_detail(_steady(drawings)) if drawings else None,
                    drawings=drawings,
                    uncovered=None if found is None else self._uncovered(found),
                    hair=found,
                    brows=find_brows(rgb, self._brows(coordinates, faces.size_px))
                    if found is not None and look.grey
                    else None,
                )
            )
        return keys

    def _draw_younger(self, looks: Sequence[Look], faces: Crops) -> list[Samples | None]:
        """Return `FaceKey.younger` of each face."""
        chosen = [i for i, look in enumerate(looks) if look.ages.target < look.ages.source]
        drawn: list[Samples | None] = [None] * len(looks)
        if not chosen:
            return drawn
        (view,) = self._younger.views
        crops = self._see(faces, chosen, view, YOUNGER_PX)
        back = _between(view, self.views[0], YOUNGER_PX, YOUNGER_PX)
        deltas = self._younger.observe([looks[i].ages for i in chosen], (crops,), [None] * len(chosen))
        for i, delta in zip(chosen, deltas, strict=True):
            luma = YOUNGER_SHARE * maps.luma_of_planes(delta)
            mask = maps.constant(face_mask, YOUNGER_PX, like=luma)
            drawn[i] = maps.warp(luma * (mask / 2), back, YOUNGER_PX)
        return drawn

    def _draw_older(self, looks: Sequence[Look], faces: Crops) -> list[Samples | None]:
        """Return the change of each face in its crop: float32 [P, P, 3], as the first channels of `Look.tone`."""
        chosen = [i for i, look in enumerate(looks) if look.ages.target > look.ages.source]
        drawn: list[Samples | None] = [None] * len(looks)
        if not chosen:
            return drawn
        (side,) = self._older_view.sizes_px
        near = _close(faces)[chosen]
        pixels = self._see(faces, chosen, self._older_view, side, (CLOSE_SIGMA * near).tolist()).pixels
        now, wanted = Ages.columns([looks[i].ages for i in chosen])
        reach = DRAWN_REACH_YEARS * np.minimum((wanted - now) / DRAWN_REACH_OVER_YEARS, 1)
        at = np.maximum(np.clip(wanted + reach, *DRAWN_YEARS), wanted).astype(np.float32)
        share = np.minimum((wanted + reach - now) / (at - now), 1)
        (changes,) = self._older()(pixels, beside(pixels, now), beside(pixels, at))
        back = _between(self._older_view, self.views[0], side, side)
        gains = DRAWN_GAIN + (CLOSE_GAIN - DRAWN_GAIN) * near
        for i, change, amount, gain in zip(chosen, changes, share.tolist(), gains.tolist(), strict=True):
            luma, *chroma = (maps.warp(plane, back, side) for plane in change)
            luma = limit(gain * amount * luma, *DRAWN_LIMITS)
            red, blue = (DRAWN_CHROMA * looks[i].colour * amount * plane for plane in chroma)
            drawn[i] = maps.stacked([luma, red, blue])
        return drawn

    def _see(
        self, faces: Crops, chosen: Sequence[int], view: View, size_px: int, sigmas: Sequence[float] | None = None
    ) -> Crops:
        """Return some of the faces as another view has them; each blurred by a Gaussian of so many pixels, if any."""
        matrix = _between(self.views[0], view, faces.size_px, size_px)
        seen = [maps.warp(maps.pixels_of(faces.pixels[i]), matrix, size_px, is_replicated=True) for i in chosen]
        if sigmas is not None:
            seen = [
                maps.blur(face, sigma) if sigma > MIN_BLUR_PX else face
                for face, sigma in zip(seen, sigmas, strict=True)
            ]
        pixels = [maps.by_planes(face) for face in seen]
        return Crops(
            pixels=maps.namespace(pixels[0]).stack(pixels),
            landmarks=apply_affine(np.repeat(matrix[None], len(chosen), 0), faces.landmarks[list(chosen)]),
            frame_to_crop=np.zeros((len(chosen), 2, 3), np.float32),
        )

    def _on_face(self, drawn: Samples, coordinates: Samples) -> Samples:
        """Return a drawn change [P, P, 3] that is 0 outside the face, and evened out where it is wide.

        Folds and bags are on both halves of a face, or nearly; a patch on one cheek looks like dirt.
        """
        size = len(drawn)
        wide, where = maps.blur(maps.shrink(drawn, EVEN_PX), EVEN_SIGMA), maps.shrink(coordinates, EVEN_PX)
        even = EVEN_SHARE * (maps.remap(wide, _opposite(where)) - wide)
        return maps.times(drawn + maps.resize(even, size, size), self._inside(coordinates, size))

    def _inside(self, coordinates: Samples, size_px: int) -> Samples:
        """Return the canonical mask in a face's crop: float32 [S, S]."""
        mask = self._canonical_beside(coordinates).areas.mask
        return maps.remap(mask, maps.resize(coordinates, size_px, size_px))

    def _part(self, coordinates: Samples, size_px: int, *, is_whole: bool) -> Rect:
        """Return `FaceKey.part`. Of tensors it is the whole crop: nobody waits for their device to know."""
        if is_whole or not isinstance(coordinates, np.ndarray):
            return 0, 0, size_px, size_px
        cells = maps.dilate(maps.shrink(self._inside(coordinates, size_px // 2), COLOUR_PX), 3)
        rows, columns = np.flatnonzero(cells.any(1)), np.flatnonzero(cells.any(0))
        if not len(rows):
            return 0, 0, 0, 0
        cell_px = size_px // COLOUR_PX
        left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return int(left) * cell_px, int(top) * cell_px, int(right) * cell_px, int(bottom) * cell_px

    def _brows(self, coordinates: Samples, size_px: int) -> Samples:
        """Return where brows can be in a face's crop: float32 [S, S]."""
        brows = self._canonical_beside(coordinates).areas.brows
        return maps.remap(brows, maps.resize(coordinates, size_px, size_px))

    def _uncovered(self, hair: HairKey) -> Samples:
        """Return where a face's crop shows no hair: float32 [64, 64]."""
        face, head = self.views
        matrix = _between(head, face, hair.mask.shape[0], UNCOVERED_PX)
        return 1 - maps.warp(hair.mask, matrix, UNCOVERED_PX).clip(0, 1)

    def draw(self, look: Look, before: FaceKey, after: FaceKey, share: float) -> list[Change | None]:
        """Read the change where the face lies; see `base.Ager.draw`."""
        changes: list[Change | None] = [self._draw_face(look, before, after, share)]
        if len(self.views) > 1:
            hair = None
            if look.grey and before.hair is not None and after.hair is not None:
                hair = draw_hair(look.grey, before.hair, after.hair, share)
            changes.append(hair)
        return changes

    def _draw_face(self, look: Look, before: FaceKey, after: FaceKey, share: float) -> Change:
        size, part = before.size_px, enclosing(before.part, after.part)
        blur = (1 - share) * before.blur + share * after.blur
        if isinstance(blur, float) and blur * size > MIN_BLUR_PX:
            part = _grown(part, math.ceil(BLUR_REACH * blur * COLOUR_PX) * (size // COLOUR_PX), size)
        delta, gain = maps.zeros(3, size, size, like=look.tone), maps.zeros(size, size, like=look.tone)
        if part[2] > part[0]:
            self._draw_part(delta, gain, part, look, before, after, share)
        if part != (part := _inside_rim(part, size)):
            maps.clear_rim(delta)
            maps.clear_rim(gain[None])
        if not look.grey or before.brows is None or after.brows is None:
            return Change(delta=delta, gain=gain, part=part)
        part = enclosing(part, enclosing(before.brows.part, after.brows.part))
        change = Change(delta=delta, gain=gain, part=part)
        add_hair(change, BROW_GREY * look.grey, before.brows, after.brows, share)
        return change

    def _draw_part(
        self, delta: Samples, gain: Samples, part: Rect, look: Look, before: FaceKey, after: FaceKey, share: float
    ) -> None:
        """Write the face's change in a part of its crop into a change of 0."""
        size, (left, top, right, bottom) = before.size_px, part
        height, width = bottom - top, right - left

        def mixed(first: Samples, second: Samples) -> Samples:
            """Return what two maps of the whole crop have of the part, mixed."""
            x0, y0, x1, y1 = (edge * len(first) // size for edge in part)
            return maps.mix(first[y0:y1, x0:x1], second[y0:y1, x0:x1], share)

        def enlarged(each: Samples) -> Samples:
            return maps.resize(each, height, width)

        where = enlarged(mixed(before.coordinates, after.coordinates))
        tone = maps.remap(look.tone, where)
        close = (1 - share) * before.close + share * after.close
        if close and look.crisp is not None:
            none = maps.zeros(height, width, like=where)
            tone += maps.stacked([close * maps.remap(look.crisp, where), none, none, none])
        blur = (1 - share) * before.blur + share * after.blur
        tone = maps.blur_within(tone, blur * size, MIN_BLUR_PX, BLUR_SIGMA * size)
        if before.older is not None and after.older is not None:
            tone += enlarged(mixed(before.older, after.older))
        if before.uncovered is not None and after.uncovered is not None:
            tone = maps.times(tone, enlarged(mixed(before.uncovered, after.uncovered)))
        luma, small = maps.channel(tone, 0), maps.halve(tone)
        colours = mixed(before.colours, after.colours)
        headroom = ((BRIGHT[1] - maps.luma_of(colours)) / (BRIGHT[1] - BRIGHT[0])).clip(0, 1)
        ratio = maps.exp(luma.clip(max=0) + luma.clip(min=0) * enlarged(headroom))
        scaled, added = ratio - 1, maps.zeros(height, width, like=luma)
        if before.smooth is not None and after.smooth is not None:
            taken = ratio * enlarged(maps.channel(small, 3))
            scaled -= taken
            added += 2 * taken * (mixed(before.smooth, after.smooth) + BLACK_OFFSET)
        if before.younger is not None and after.younger is not None:
            added += 2 * enlarged(mixed(before.younger, after.younger))
        inner = slice(top, bottom), slice(left, right)
        gain[inner] = scaled
        for plane, component in zip(delta, maps.channels(self._chroma(small, colours)), strict=True):
            plane[inner] = enlarged(component) + added

    @staticmethod
    def _chroma(tone: Samples, colours: Samples) -> Samples:
        """Return the change of chroma, without luma: float32 [H, W, 3], RGB in units of [-1, 1].

        The colours of the face change by the log ratios; what of that is grey is the gain's.

        Args:
            tone: float32 [H, W, 4], as `Look.tone`.
            colours: as `FaceKey.colours`, of the same part of the face.
        """
        rgb = maps.resize(colours, *tone.shape[:2]) + BLACK_OFFSET
        change = rgb * (maps.exp(maps.transform(tone, _tone_to_log_rgb)) - 1)
        return maps.transform(change, _twice_without_luma)


def _opposite(coordinates: Samples) -> Samples:
    """Return for each place of a map of coordinates [M, M, 2] where in it the other half of the face has the same."""
    size, (x, y) = len(coordinates), maps.channels(coordinates)
    wanted = maps.stacked([CANONICAL_PX - 1 - x, y])
    slope = (x[:, -1] - x[:, 0]).mean() / (size - 1)
    at = maps.constant(_flipped_grid, size, like=coordinates)
    for _ in range(3):  # steps of Newton's method, with one slope for all; more change nothing
        there = maps.stacked([maps.remap(each, at) for each in (x, y)])
        at = (at + (wanted - there) / slope).clip(0, size - 1)
    return at


@cache
def _flipped_grid(size_px: int) -> FloatArray:
    """Return the positions of a map's pixels when it is flipped from left to right: float32 [S, S, 2], x and y."""
    y, x = np.mgrid[:size_px, :size_px][:, :, ::-1].astype(np.float32)
    return np.stack([x, y], -1)


@cache
def _tone_to_log_rgb() -> FloatArray:
    """Return log ratios of R, G and B from those of luma, R/G and B/G: float32 [3, 4].

    log G = log Y - 0.299 log R/G - 0.114 log B/G, nearly.
    """
    red, _, blue = RGB_LUMA
    return np.array([[1, 1 - red, -blue, 0], [1, -red, -blue, 0], [1, -red, 1 - blue, 0]], np.float32)


@cache
def _twice_without_luma() -> FloatArray:
    """Return the map from RGB to twice RGB less its luma: float32 [3, 3]."""
    return 2 * (np.eye(3, dtype=np.float32) - RGB_LUMA)


def _grown(part: Rect, by_px: int, size_px: int) -> Rect:
    """Return a part of a crop, larger by so many pixels on all sides where the crop goes on."""
    left, top, right, bottom = part
    return max(left - by_px, 0), max(top - by_px, 0), min(right + by_px, size_px), min(bottom + by_px, size_px)


def _inside_rim(part: Rect, size_px: int) -> Rect:
    """Return what a part of a crop has inside of the crop's outer two pixels, in which a change is 0."""
    left, top, right, bottom = part
    return max(left, 2), max(top, 2), min(right, size_px - 2), min(bottom, size_px - 2)


def _between(source: View, target: View, source_px: int, target_px: int) -> FloatArray:
    """Return the map from crops of one view to those of another: float32 [2, 3]."""
    points = template_5(source_px, source.template)[None]
    return similarity_to_template(points, template_5(target_px, target.template))[0]


def _reduce(pixels: Samples, side_px: int) -> Samples:
    """Return crops [F, 3, S, S] at the side that a network takes; S is a multiple of it."""
    times = pixels.shape[-1] // side_px
    return pixels if times == 1 else pixels.reshape(-1, 3, side_px, times, side_px, times).mean((3, 5))


def _fineness(face: Samples) -> maps.Number:
    """Return how sharp a face [3, S, S] is: its detail below 0.6 % of the crop's side to that of 0.6 to 2.5 %."""
    xp, side = maps.namespace(face), face.shape[-1]
    middle = slice(side // 4, 3 * side // 4)
    luma = maps.luma_of_planes(face[:, middle, middle])
    fine, coarse = (maps.blur(luma, sigma * side / 128) for sigma in (0.8, 3.2))
    fine_detail, coarse_detail = (xp.std(each, correction=0) for each in (luma - fine, fine - coarse))
    return maps.number(fine_detail / maps.limit(coarse_detail, 1e-6))


def _crisp(tone: Samples) -> Samples:
    """Return `Look.crisp` of a canonical change."""
    luma = maps.channel(tone, 0)
    detail = luma - maps.blur(luma, CRISP_SIGMA)
    return CRISP_DARKER * detail.clip(max=0) + CRISP_BRIGHTER * detail.clip(min=0)


def _close(crops: Crops) -> FloatArray:
    """Return how near the faces of crops are seen, [F]; see `CLOSE_PX`."""
    far, near = CLOSE_PX
    side = crops.size_px / np.sqrt(np.abs(np.linalg.det(crops.frame_to_crop[:, :, :2])))
    return np.clip((side - far) / (near - far), 0, 1)


def _with_no_detail(change: Samples) -> Samples:
    """Return a change [P, P, 3] with the last channel of `Look.tone`: no fine detail is taken away."""
    return maps.stacked([*maps.channels(change), maps.zeros(*change.shape[:2], like=change)])


def _steady(drawings: Sequence[Drawing]) -> Samples:
    """Return the mean of what was drawn on a face at key frames, where the first of them has it: [P, P, 3].

    What is chance in a drawing is not the same in the next one; real folds are. A mean has less fine detail than what
    it is of, and is given as much again.
    """
    first, *others = drawings
    if not others:
        return first.change
    moved = [other.moved_to(first) for other in others]
    count = 1 + sum(share for _, share in moved)
    steady = first.change
    for change, share in moved:
        steady = steady + maps.times(change - first.change, share / count)
    wanted, levels = maps.channel(first.change, 0), []
    for _ in range(2):
        coarse, own = maps.halve(steady), maps.halve(wanted)
        detail = steady - maps.resize(coarse, *steady.shape[:2])
        powers = [(each**2).mean() for each in (wanted - maps.resize(own, *wanted.shape), maps.channel(detail, 0))]
        gain = maps.number((powers[0] / (powers[1] + 1e-12)) ** 0.5)
        levels.append(maps.limit(gain, 1.0, STEADY_GAIN) * detail)
        steady, wanted = coarse, own
    for detail in reversed(levels):
        steady = maps.resize(steady, *detail.shape[:2]) + detail
    return steady


def _read_off(each: Samples, offset: Samples) -> Samples:
    """Return maps [S, S(, C)] of a crop read at an offset from each pixel, [M, M, 2] in sides of the crop."""
    side = len(each)
    where = maps.constant(_pixels, side, like=each) + side * maps.resize(offset, side, side)
    return maps.remap(each, where)


@cache
def _pixels(size_px: int) -> FloatArray:
    """Return where each pixel of a crop is: float32 [S, S, 2]."""
    return np.stack(np.meshgrid(*[np.arange(size_px, dtype=np.float32)] * 2), -1)


def _smooth(luma: Samples) -> Samples:
    """Return luma [S, S] in [0, 1] without fine detail; edges are kept."""
    half = maps.halve(luma)
    return maps.resize(maps.bilateral(half, -1, SMOOTH_RANGE, SMOOTH_SIGMA * half.shape[0]), *luma.shape)


def coordinates_program(checkpoint: Path) -> Program:
    """(faces [F, 3, S, S], landmarks [F, 10]) -> coordinates; see `networks.space.CoordinateNet`."""
    dims = read_header(checkpoint).dims

    def network(folded: bool) -> nn.Module:
        from faceage.networks.space import CoordinateDims, CoordinateNet

        return load_network(checkpoint, lambda dims: CoordinateNet(CoordinateDims(**dims)))

    def examples() -> tuple[FloatArray, ...]:
        landmarks = np.stack([TEMPLATES[dims["template"]].reshape(-1)] * EXAMPLES)
        return example_faces(EXAMPLES, dims["size_px"]), landmarks

    return _program(checkpoint, network, examples, (2, dims["map_px"]), (TensorSpec("landmarks", (BATCH, 10)),))


def hair_program(checkpoint: Path) -> Program:
    """Heads [F, 3, S, S] -> logits of hair [F, 1, S/2, S/2]."""
    dims = read_header(checkpoint).dims

    def network(folded: bool) -> nn.Module:
        from faceage.networks.space import MapDims, MapNet

        return load_network(checkpoint, lambda dims: MapNet(MapDims(**dims)))

    def examples() -> tuple[FloatArray, ...]:
        return (example_faces(EXAMPLES, dims["size_px"]),)

    return _program(checkpoint, network, examples, (dims["outputs"], dims["size_px"] // 2))


def older_program(checkpoint: Path) -> Program:
    """(faces [F, 3, S, S], ages now [F], wanted ages [F]) -> log ratios; see `networks.space.OlderNet`."""
    size = read_header(checkpoint).dims["size_px"]

    def network(folded: bool) -> nn.Module:
        from faceage.networks.space import OlderDims, OlderNet

        return load_network(checkpoint, lambda dims: OlderNet(OlderDims(**dims)))

    def examples() -> tuple[FloatArray, ...]:
        wanted = np.linspace(*DRAWN_YEARS, EXAMPLES, dtype=np.float32)
        return example_faces(EXAMPLES, size), wanted - 35, wanted

    ages = (TensorSpec("now", (BATCH,)), TensorSpec("wanted", (BATCH,)))
    return _program(checkpoint, network, examples, (3, size), ages, exact=False)


def _program(
    checkpoint: Path,
    network: Callable[[bool], nn.Module],
    examples: Callable[[], tuple[FloatArray, ...]],
    output: tuple[int, int],
    more: tuple[TensorSpec, ...] = (),
    *,
    exact: bool = True,
) -> Program:
    """Return a program whose output has so many channels and such a side."""
    channels, side = output
    header = read_header(checkpoint)
    size = header.dims["size_px"]
    return Program(
        name=header.arch,
        graph=graph_of(checkpoint, header.arch),
        checkpoints=(checkpoint,),
        network=network,
        examples=examples,
        inputs=(TensorSpec("crops", (BATCH, 3, size, size)), *more),
        outputs=(TensorSpec("maps", (BATCH, channels, side, side)),),
        exact=exact,
    )


def _programs(files: ModelFiles, identity: Path) -> dict[str, Program]:
    return {
        "coordinates": coordinates_program(files.paths["coordinates"]),
        "hair": hair_program(files.paths["hair"]),
        "younger": unet_program(files.paths["younger"], YOUNGER_PX),
        "older": older_program(files.paths["older"]),
    }


def _make(files: ModelFiles, engine: EngineOf, *, hair: bool = True) -> SpaceAger:
    views = [read_view(files.paths["coordinates"], FACE_SIZES_PX)]
    if hair:
        views.append(read_view(files.paths["hair"], HEAD_SIZES_PX))
    return SpaceAger(
        coordinates=engine("coordinates"),
        hair=engine("hair") if hair else None,
        younger=FaceGAN(unet=lambda size_px: engine("younger"), view=read_view(files.paths["younger"], (YOUNGER_PX,))),
        older=lambda: engine("older"),
        older_view=read_view(files.paths["older"], (read_header(files.paths["older"]).dims["size_px"],)),
        canonical=read_canonical(files.generator),
        views=tuple(views),
    )


ARCHITECTURE = Architecture(
    name="space",
    roles={
        "generator": "space",
        "coordinates": "space-coordinates",
        "hair": "space-hair",
        "younger": "facegan",
        "older": "space-older",
    },
    programs=_programs,
    make=_make,
    always=("older",),
    options=("hair",),
)
