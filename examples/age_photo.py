"""Age the faces of one photo.

python examples/age_photo.py portrait.png aged.png 70
"""

import sys
from pathlib import Path

import faceage

source, target, age = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

# The networks are loaded once and shared by everything that follows. The first run on a machine builds their
# engines, which takes some seconds each; later runs find them in the cache.
networks = faceage.load_networks(on_build=lambda name: print(f"building engine {name} (once)"))

# Either an age, or a number of years to add: AgeRequest(by=+20).
request = faceage.AgeRequest(age=age)

# Photos are aged in batches, so this takes a list and gives a report for each.
(report,) = faceage.age_photos(networks, [(source, target)], request, overwrite=True)

if report.error:
    sys.exit(report.error)
for face in report.faces:
    print(f"a face at {face.box}: {face.source_age:.0f} -> {face.target_age:.0f} years")
print(f"written to {target}")
