"""Age everybody in a video by a number of years.

python examples/age_video.py clip.mp4 aged.mp4 +30
"""

import sys
from pathlib import Path

import faceage

source, target, years = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
networks = faceage.load_networks()


# The first pass finds and follows everybody; the second adds the change to each frame. Both report here.
def show(stage: str, done: int, total: int | None) -> None:
    if done % 25 == 0:
        print(f"{stage}: {done} of {total or '?'} frames")


report = faceage.age_video(
    networks,
    source,
    target,
    faceage.AgeRequest(by=years),
    # Codec, bit depth and pixel format follow the source unless they are given here.
    encode=faceage.EncodeOptions(crf=16, overwrite=True),
    # Faces are searched for in every tenth frame and followed in between.
    track=faceage.TrackConfig(detect_every=10),
    progress=show,
)

for person in report.people:
    frames = f"frames {person.first_frame} to {person.last_frame}"
    print(f"person {person.person}, {frames}: {person.source_age:.0f} -> {person.target_age:.0f} years")
print(f"{report.frames} frames in {report.seconds:.1f} s, written to {target}")
