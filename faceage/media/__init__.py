"""Reading and writing media. For videos, import from `faceage.media.video`."""
