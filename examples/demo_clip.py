"""Make the demo's video out of `portrait.jpg`: NASA's public-domain portrait of Eileen Collins.

    python examples/demo_clip.py out/demo

The video is the portrait under a moving camera (it drifts, zooms and rolls a little), with a tone as its sound, so
that what a face tool must keep can be seen and heard: motion, frame times, audio.
"""

import math
import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image

PORTRAIT = Path(__file__).parent / "portrait.jpg"
SIDE_PX, FRAME_RATE, SECONDS, SAMPLE_RATE, TONE_HZ = 512, 25, 4, 44_100, 220


def camera(portrait: np.ndarray, time_s: float) -> np.ndarray:
    """Return the portrait as the moving camera sees it at a time."""
    phase = 2 * math.pi * time_s / SECONDS
    zoom = 1.45 + 0.15 * math.sin(phase)
    roll_degrees = 4 * math.sin(2 * phase)
    # The face is left of and above the middle of the portrait: the camera looks there, and drifts around it.
    look_at = (225 + 14 * math.cos(phase), 150 + 8 * math.sin(phase))
    matrix = cv2.getRotationMatrix2D(look_at, roll_degrees, zoom)
    matrix[:, 2] += np.array([SIDE_PX / 2, SIDE_PX / 2 - 30]) - look_at
    return cv2.warpAffine(portrait, matrix, (SIDE_PX, SIDE_PX), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)


def write_video(portrait: np.ndarray, path: Path) -> None:
    """Encode the moving portrait and the tone."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", FRAME_RATE, options={"crf": "16"})
        video.width = video.height = SIDE_PX
        video.pix_fmt = "yuv420p"
        sound = container.add_stream("aac", SAMPLE_RATE, layout="mono")
        for i in range(SECONDS * FRAME_RATE):
            frame = av.VideoFrame.from_ndarray(camera(portrait, i / FRAME_RATE), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FRAME_RATE)
            container.mux(video.encode(frame))
        tone = 0.1 * np.sin(2 * np.pi * TONE_HZ * np.arange(SECONDS * SAMPLE_RATE) / SAMPLE_RATE)
        samples = av.AudioFrame.from_ndarray(tone[None].astype(np.float32), format="fltp", layout="mono")
        samples.sample_rate, samples.pts = SAMPLE_RATE, 0
        container.mux(sound.encode(samples))
        container.mux(video.encode(None))
        container.mux(sound.encode(None))


def main(folder: Path) -> None:
    """Write clip.mp4."""
    folder.mkdir(parents=True, exist_ok=True)
    portrait = np.array(Image.open(PORTRAIT))  # uint8 [512, 512, 3]
    write_video(portrait, folder / "clip.mp4")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
