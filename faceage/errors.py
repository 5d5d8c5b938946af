"""The errors that faceage raises for reasons a user can act on.

A message has three parts: what was found, what was expected, what to do. Anything else that
is raised is a bug and keeps its traceback.
"""


class FaceAgeError(Exception):
    """Base of every error that the command line shows as one line."""


class MediaError(FaceAgeError):
    """A file cannot be read or written as the media it should be."""


class NoFaceError(FaceAgeError):
    """A picture that needs a face has none."""


class CheckpointError(FaceAgeError):
    """A checkpoint is missing, damaged, or of the wrong kind."""


class EngineError(FaceAgeError):
    """An engine cannot be built, loaded or run on this machine."""


class UnfitEngineError(EngineError):
    """An engine is whole, but for another GPU or driver: building it anew here would take it from those."""


class UnsupportedError(FaceAgeError):
    """A valid input that faceage does not handle: a pixel format, an option that does not fit."""


class ShapeError(FaceAgeError, ValueError):
    """An array does not have the documented shape or dtype."""
