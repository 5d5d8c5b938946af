"""libjpeg-turbo's TurboJPEG interface, called through ctypes: JPEG planes and coefficients in memory.

It is the interface that hands out a file's DCT coefficients and codes them again, progressive files and restart
markers included; no Python package wraps that part. The library comes inside pylibjxl's wheel, whose extension module
exports TurboJPEG's C functions; pylibjxl's Python code is not used. Calls are safe from several threads at once.

Reference: turbojpeg.h of libjpeg-turbo 3.1.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from faceage.errors import UnsupportedError

Coefficients = npt.NDArray[np.int16]
EditRow = Callable[[int, int, Coefficients], None]
"""Called with a component's number, the number of a row of blocks, and its quantised coefficients [blocks, 64], to be
changed in place. A block's coefficients lie row by row, not in zigzag."""

# turbojpeg.h: enum TJINIT, TJPARAM, TJCS, TJXOPT_*, TJERR.
_INIT_DECOMPRESS, _INIT_TRANSFORM = 1, 2
_SUBSAMP, _WIDTH, _HEIGHT, _COLORSPACE, _RESTART_BLOCKS = 4, 5, 6, 8, 18
_YCBCR, _GRAY = 1, 2
_PROGRESSIVE, _COPY_NONE, _OPTIMIZE = 32, 64, 256
_WARNING = 0
_PIXEL_FORMATS = {0: "yuvj444p", 1: "yuvj422p", 2: "yuvj420p", 3: "gray", 4: "yuvj440p", 5: "yuvj411p"}
"""By TJSAMP."""


class _Region(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int) for name in "xywh")


_Filter = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, _Region, _Region, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)


class _Transform(ctypes.Structure):
    _fields_ = (
        ("region", _Region),
        ("operation", ctypes.c_int),
        ("options", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("filter", _Filter),
    )


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "tj3Init": (pointer, [integer]),
        "tj3Destroy": (None, [pointer]),
        "tj3Free": (None, [pointer]),
        "tj3Get": (integer, [pointer, integer]),
        "tj3Set": (integer, [pointer, integer, integer]),
        "tj3GetErrorCode": (integer, [pointer]),
        "tj3GetErrorStr": (ctypes.c_char_p, [pointer]),
        "tj3DecompressHeader": (integer, [pointer, ctypes.c_char_p, size]),
        "tj3DecompressToYUVPlanes8": (integer, [pointer, ctypes.c_char_p, size, pointer, pointer]),
        "tj3Transform": (integer, [pointer, ctypes.c_char_p, size, integer, pointer, pointer, pointer]),
        "tj3YUVPlaneWidth": (integer, [integer, integer, integer]),
        "tj3YUVPlaneHeight": (integer, [integer, integer, integer]),
    }
    spec = find_spec("pylibjxl")
    folders = (spec.submodule_search_locations if spec else None) or []
    try:
        library = ctypes.CDLL(str(next(path for folder in folders for path in Path(folder).glob("_pylibjxl*.so"))))
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (StopIteration, OSError, AttributeError) as error:
        raise UnsupportedError(
            f"libjpeg-turbo was not found in pylibjxl ({error}); run `pip install 'pylibjxl>=0.5,<0.6'`"
        ) from error
    return library


def why_missing() -> str | None:
    """Return why JPEGs cannot be edited in place here, or None if they can."""
    try:
        _library()
    except UnsupportedError as error:
        return str(error)
    return None


@contextmanager
def _instance(kind: int) -> Iterator[int]:
    library = _library()
    handle = library.tj3Init(kind)
    if not handle:
        raise MemoryError("libjpeg-turbo cannot start")
    try:
        yield handle
    finally:
        library.tj3Destroy(handle)


def _check(handle: int, status: int) -> None:
    """Raise ValueError for what is damaged beyond the warnings that every decoder passes over, and for lost rows."""
    if status == 0:
        return
    message = _library().tj3GetErrorStr(handle).decode(errors="replace")
    if _library().tj3GetErrorCode(handle) != _WARNING or "Premature end of JPEG file" in message:
        raise ValueError(message)


def decode_planes(data: bytes) -> tuple[str, list[npt.NDArray[np.uint8]]] | None:
    """Decode a JPEG to its own planes: the samples that any decoder has before it enlarges the chroma.

    Args:
        data: a JPEG of 8 bits a sample.

    Returns:
        The pixel format and its planes, as stored. Luma is padded to whole chroma samples. None if the colours are not
        YCbCr or gray, or if the subsampling is rare: no pixel format names it.

    Raises:
        ValueError: if the data is damaged or truncated.
    """
    library = _library()
    with _instance(_INIT_DECOMPRESS) as handle:
        _check(handle, library.tj3DecompressHeader(handle, data, len(data)))
        width, height, subsampling, colorspace = (
            library.tj3Get(handle, name) for name in (_WIDTH, _HEIGHT, _SUBSAMP, _COLORSPACE)
        )
        pixel_format = _PIXEL_FORMATS.get(subsampling)
        if pixel_format is None or colorspace not in (_YCBCR, _GRAY):
            return None
        planes = [
            np.empty(
                (
                    library.tj3YUVPlaneHeight(i, height, subsampling),
                    library.tj3YUVPlaneWidth(i, width, subsampling),
                ),
                np.uint8,
            )
            for i in range(1 if pixel_format == "gray" else 3)
        ]
        pointers = (ctypes.c_void_p * 3)(*(plane.ctypes.data for plane in planes))
        _check(handle, library.tj3DecompressToYUVPlanes8(handle, data, len(data), pointers, None))
    return pixel_format, planes


def edit_coefficients(
    data: bytes,
    edit: EditRow,
    rows: Sequence[Collection[int]],
    *,
    progressive: bool,
    optimize: bool = False,
    restart_interval: int = 0,
) -> bytes:
    """Change quantised coefficients of a JPEG; all others are coded again as they are.

    Args:
        data: a JPEG of 8 bits a sample.
        edit: called for some rows of blocks.
        rows: the numbers of these rows, of each component.
        progressive: code the result in several scans.
        optimize: compute Huffman tables for the result; progressive files always have such.
        restart_interval: blocks (MCUs) between restart markers, 0 for none.

    Returns:
        A JPEG without the source's APPn and COM segments.

    Raises:
        ValueError: if the data is damaged or truncated.
    """
    library = _library()
    raised: list[Exception] = []

    def call(address: int, row: _Region, plane: _Region, component: int, number: int, transform: int) -> int:
        if row.y // 8 not in rows[component]:
            return 0
        memory = (ctypes.c_int16 * (row.w * 8)).from_address(address)
        try:
            edit(component, row.y // 8, np.frombuffer(memory, np.int16).reshape(-1, 64))
        except Exception as error:  # noqa: BLE001  carried out of the C code
            raised.append(error)
            return -1
        return 0

    options = _COPY_NONE | (_PROGRESSIVE if progressive else 0) | (_OPTIMIZE if optimize else 0)
    job = _Transform(options=options, filter=_Filter(call))
    buffer, size = ctypes.c_void_p(), ctypes.c_size_t()
    with _instance(_INIT_TRANSFORM) as handle:
        library.tj3Set(handle, _RESTART_BLOCKS, restart_interval)
        try:
            status = library.tj3Transform(
                handle, data, len(data), 1, ctypes.byref(buffer), ctypes.byref(size), ctypes.byref(job)
            )
            if raised:
                raise raised[0]
            _check(handle, status)
            return ctypes.string_at(buffer, size.value)
        finally:
            library.tj3Free(buffer)
