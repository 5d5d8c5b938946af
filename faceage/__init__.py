"""Age or rejuvenate every face in a video or a folder of images, and touch nothing else.

>>> import faceage
>>> networks = faceage.load_networks()
>>> request = faceage.AgeRequest(age=70)
>>> faceage.age_video(networks, "in.mp4", "out.mp4", request)  # doctest: +SKIP

The names below are imported when they are first used: `import faceage` itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from faceage.detect import DetectConfig
    from faceage.errors import FaceAgeError
    from faceage.follow import TrackConfig
    from faceage.media.codecs import EncodeOptions
    from faceage.media.find import find_images
    from faceage.pipeline.photos import age_photos
    from faceage.pipeline.report import FaceReport, PersonReport, PhotoReport, VideoReport
    from faceage.pipeline.request import AgeCurve, AgeRequest, Networks, load_networks
    from faceage.pipeline.sheet import make_sheet
    from faceage.pipeline.video import age_video
    from faceage.pipeline.workers import Cluster, Processes

__version__ = "0.1.0"

_HOMES = {
    "AgeCurve": "faceage.pipeline.request",
    "AgeRequest": "faceage.pipeline.request",
    "Cluster": "faceage.pipeline.workers",
    "DetectConfig": "faceage.detect",
    "EncodeOptions": "faceage.media.codecs",
    "FaceAgeError": "faceage.errors",
    "FaceReport": "faceage.pipeline.report",
    "Networks": "faceage.pipeline.request",
    "PersonReport": "faceage.pipeline.report",
    "PhotoReport": "faceage.pipeline.report",
    "Processes": "faceage.pipeline.workers",
    "TrackConfig": "faceage.follow",
    "VideoReport": "faceage.pipeline.report",
    "age_photos": "faceage.pipeline.photos",
    "age_video": "faceage.pipeline.video",
    "find_images": "faceage.media.find",
    "load_networks": "faceage.pipeline.request",
    "make_sheet": "faceage.pipeline.sheet",
}

__all__ = [
    "AgeCurve",
    "AgeRequest",
    "Cluster",
    "DetectConfig",
    "EncodeOptions",
    "FaceAgeError",
    "FaceReport",
    "Networks",
    "PersonReport",
    "PhotoReport",
    "Processes",
    "TrackConfig",
    "VideoReport",
    "age_photos",
    "age_video",
    "find_images",
    "load_networks",
    "make_sheet",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
