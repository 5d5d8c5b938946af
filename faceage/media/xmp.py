"""The label that says a still is partly synthetic: an XMP packet, merged into the one the file has.

Reference: IPTC Photo Metadata Standard 2023.1, "Digital Source Type"; ISO 16684-1 (XMP).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
IPTC_EXT = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
FACEAGE = "urn:faceage:label:1:"
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"

_EMPTY = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    f'<rdf:RDF xmlns:rdf="{RDF}"></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
_OLD_LABEL = re.compile(rf'<rdf:Description\b[^>]*xmlns:faceage="{FACEAGE}".*?</rdf:Description>', re.DOTALL)
_OLD_SOURCE_TYPE = re.compile(
    r"\s+Iptc4xmpExt:DigitalSourceType\s*=\s*(?:\"[^\"]*\"|'[^']*')"
    r"|<Iptc4xmpExt:DigitalSourceType\b[^>]*?(?:/>|>.*?</Iptc4xmpExt:DigitalSourceType>)",
    re.DOTALL,
)


def label_xmp(packet: bytes | None, label: Mapping[str, str]) -> bytes:
    """Return the XMP packet with the label in it.

    The packet that is there is kept as it is, but for its padding, a digital source type (there may be only
    one: the picture is a composite now) and a label of an earlier run. One without an rdf:RDF element
    in UTF-8 cannot be added to and is replaced.

    Args:
        packet: the file's XMP packet, or None.
        label: field names (letters, digits, underscores) and values, such as tool, model, target_age.

    Returns:
        The packet, UTF-8.
    """
    try:
        text = packet.decode() if packet else _EMPTY
    except UnicodeDecodeError:
        text = _EMPTY
    if "</rdf:RDF>" not in text:
        text = _EMPTY
    text = _OLD_SOURCE_TYPE.sub("", _OLD_LABEL.sub("", text))
    text = re.sub(r"\s+(?=<\?xpacket end)", "", text)  # padding: a JPEG holds no packet over 64 KB
    # The descriptions of one packet must be about the same resource.
    found = re.search(r"rdf:about\s*=\s*(\"[^\"]*\"|'[^']*')", text)
    about = found[1] if found else '""'
    fields = "".join(f"<faceage:{key}>{_escape(value)}</faceage:{key}>" for key, value in label.items())
    description = (
        f"<rdf:Description rdf:about={about}"
        f' xmlns:faceage="{FACEAGE}" xmlns:Iptc4xmpExt="{IPTC_EXT}">'
        f"<Iptc4xmpExt:DigitalSourceType>{SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>{fields}"
        "</rdf:Description>"
    )
    head, end, tail = text.rpartition("</rdf:RDF>")
    return (head + description + end + tail).encode()


def _escape(text: str) -> str:
    """Return text as XML has it; the standard library's functions for it bring a network client or a large table."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
