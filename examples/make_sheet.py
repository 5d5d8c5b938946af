"""Show the faces of a photo at several ages, in one picture.

python examples/make_sheet.py portrait.png sheet.png
"""

import sys
from pathlib import Path

from PIL import Image

import faceage

source, target = Path(sys.argv[1]), Path(sys.argv[2])
networks = faceage.load_networks()
sheet = faceage.make_sheet(networks, source, ages=[10, 20, 30, 40, 50, 60, 70, 80])  # uint8 [H, W, 3], RGB
Image.fromarray(sheet).save(target)
print(f"a sheet of {sheet.shape[1]}x{sheet.shape[0]} pixels, written to {target}")
