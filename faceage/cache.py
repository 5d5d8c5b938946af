"""Where faceage keeps what it builds and downloads."""

import os
from pathlib import Path


def cache_root() -> Path:
    """Return $FACEAGE_CACHE, or `faceage` in the user's cache folder. The folder may not exist yet."""
    if "FACEAGE_CACHE" in os.environ:
        return Path(os.environ["FACEAGE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "faceage"
