"""What an MPEG transport stream says of its programs, which PyAV does not show.

Reference: ISO/IEC 13818-1, 2.4.3.2 and 2.4.4 (packets, sections, program association); ETSI EN 300 468, 5.2.3 and
6.2.33 (services and their names).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_SYNC = 0x47
_PACKET_BYTES = (188, 192)
"""Of .ts, and of .m2ts, which has a time before each packet."""
_READ_BYTES = 1 << 20
"""Part of the file that is read: tables come several times a second."""
_ASSOCIATION, _DESCRIPTION = (0, 0x00), (0x11, 0x42)
"""Packet identifier and table of what programs there are, and of what they are called."""
_SERVICE, _UTF8 = 0x48, 0x15


class Programs(NamedTuple):
    """The programs of a transport stream."""

    number: int
    tags: dict[str, str]
    """"service_name" and "service_provider", as FFmpeg's muxer takes them, if there is one program and it has them."""


def read_programs(path: Path) -> Programs:
    """Return the programs of a transport stream; one without a name if its tables cannot be read."""
    with path.open("rb") as file:
        data = file.read(_READ_BYTES)
    count = 0
    for section in _sections(data, *_ASSOCIATION):
        numbers = [section[at : at + 2] for at in range(8, len(section) - 4, 4)]
        count = sum(number != b"\0\0" for number in numbers)  # program 0 is the network
        break
    if count > 1:
        return Programs(count, {})
    for section in _sections(data, *_DESCRIPTION):
        return Programs(1, _names(section[11:-4]))
    return Programs(1, {})


def _sections(data: bytes, identifier: int, table: int) -> Iterator[bytes]:
    """Yield the whole sections of a table."""
    size = next((n for n in _PACKET_BYTES if all(data[n * i + n - 188 : n * i + n - 187] == b"G" for i in range(3))), 0)
    found = b""
    for at in range(size - 188, len(data) - 187, size) if size else ():
        packet = data[at : at + 188]
        if packet[0] != _SYNC or int.from_bytes(packet[1:3], "big") & 0x1FFF != identifier or not packet[3] & 0x10:
            continue
        payload = packet[5 + packet[4] :] if packet[3] & 0x20 else packet[4:]
        if packet[1] & 0x40 and payload:  # a section begins; what is before it ends the last one
            found = payload[1 + payload[0] :]
        elif found:
            found += payload
        length = 3 + (int.from_bytes(found[1:3], "big") & 0xFFF)
        if len(found) > 3 and len(found) >= length:
            if found[0] == table:
                yield found[:length]
            found = b""


def _names(services: bytes) -> dict[str, str]:
    """Return the tags of the first service that has a name."""
    end = 5 + (int.from_bytes(services[3:5], "big") & 0xFFF)
    at = 5
    while at + 2 <= min(end, len(services)):
        kind, length = services[at], services[at + 1]
        if kind == _SERVICE:
            texts = services[at + 3 : at + 2 + length]  # after the service's type
            provider, name = texts[1 : 1 + texts[0]], texts[2 + texts[0] :]
            tags = {"service_provider": _text(provider), "service_name": _text(name)}
            return {key: text for key, text in tags.items() if text}
        at += 2 + length
    return {}


def _text(text: bytes) -> str:
    """Return a text of a table: UTF-8 if it says so; what else it is, is taken for Latin 1."""
    if text[:1] == bytes([_UTF8]):
        return text[1:].decode(errors="replace")
    return text[1 if text[:1] < b" " else 0 :].decode("latin-1")
