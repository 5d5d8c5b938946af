"""Where faceage keeps what it builds and downloads."""

import os
from pathlib import Path


def cache_root() -> Path:
    """Return $FACEAGE_CACHE, or `faceage` in the user's cache folder. The folder may not exist yet."""
    if given := os.environ.get("FACEAGE_CACHE"):  # empty: as if it were not there
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "faceage"
