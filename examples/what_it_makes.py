"""Make the picture at the top of the README: one public-domain portrait, now and at four other ages.

python examples/what_it_makes.py examples/what_it_makes.jpg
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import faceage

PORTRAIT = Path(__file__).parent / "portrait.jpg"
HEAD = (110, 0, 340, 230)
"""Left, upper, right and lower edge of what is shown of the portrait, in pixels."""
AGES = (20, 50, 65, 80)

networks = faceage.load_networks()
cells = [("now", Image.open(PORTRAIT))]
with tempfile.TemporaryDirectory() as folder:
    for age in AGES:
        aged = Path(folder) / f"{age}.jpg"
        (report,) = faceage.age_photos(networks, [(PORTRAIT, aged)], faceage.AgeRequest(age=age))
        cells.append((f"at {age}", Image.open(aged)))
    cells[0] = (f"now (estimated: {report.faces[0].source_age:.0f})", cells[0][1])
    width, height = HEAD[2] - HEAD[0], HEAD[3] - HEAD[1]
    picture = Image.new("RGB", (width * len(cells) + 4 * (len(cells) - 1), height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(20)
    for i, (label, photo) in enumerate(cells):
        picture.paste(photo.convert("RGB").crop(HEAD), ((width + 4) * i, 0))
        place = ((width + 4) * i + 8, height - 8)
        draw.text(place, label, "white", font, anchor="ls", stroke_width=2, stroke_fill="black")
picture.save(sys.argv[1], quality=88)
