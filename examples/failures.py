"""Show what the bundled model gets wrong, on a public-domain portrait: the picture in the model card.

python examples/failures.py failures.jpg
"""

import sys
from pathlib import Path

import cv2
import numpy as np
from skimage.data import astronaut

import faceage
from faceage.pipeline.photos import age_frames
from faceage.types import RGB, Frame

SIZE = 256
portrait = np.ascontiguousarray(astronaut()[:SIZE, 96 : 96 + SIZE])

# 1. At 80 skin and hair are old, the neck and the shape of the face are not. 2. As a child she has an adult's bones.
# 3. Something in front of the face is aged with it: nothing says that it is not skin.
covered = portrait.copy()
cv2.rectangle(covered, (96, 128), (190, 200), (90, 120, 160), -1)
# 4. A face in the dark gets a change that does not belong to it.
dark = (portrait * 0.25).astype(np.uint8)
cases = [
    ("80: neck stays", portrait, 80),
    ("8: bones stay", portrait, 8),
    ("70: covered", covered, 70),
    ("70: dark", dark, 70),
]

networks = faceage.load_networks()
columns = []
for title, picture, age in cases:
    frame = Frame(planes=(picture.copy(),), pixel_format="rgb24", color=RGB)
    age_frames(networks, [frame], faceage.AgeRequest(age=age))
    column = np.vstack([np.full((28, SIZE, 3), 255, np.uint8), picture, frame.planes[0]])
    cv2.putText(column, title, (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
    columns.append(column)
sheet = cv2.cvtColor(np.hstack(columns), cv2.COLOR_RGB2BGR)
Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
cv2.imwrite(sys.argv[1], sheet)
print(f"originals above, aged below: {sys.argv[1]}")
