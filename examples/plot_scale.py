"""Draw what `faceage bench scale CLIP --report scale.json` measured and simulated.

python examples/plot_scale.py scale.json scale.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

record = json.loads(Path(sys.argv[1]).read_text())
(item,) = record["items"]
workers = [row["workers"] for row in item["simulated"]]

figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
axes.plot(workers, workers, color="0.7", label="ideal")
axes.plot(workers, [row["speedup"] for row in item["simulated"]], "o-", label="simulated, an hour of video")
measured = item["jobs"]
axes.plot([row["jobs"] for row in measured], [row["speedup"] for row in measured], "s", label="measured (--jobs)")
axes.set(
    xscale="log", yscale="log", xlabel="workers", ylabel="times as fast as one", xticks=workers, yticks=workers,
    title=f"{Path(item['source']).name}, {item['machine']['cpu']}, {item['machine']['cores']} cores",
)  # fmt: skip
axes.title.set_size("small")
axes.set_xticklabels(workers)
axes.set_yticklabels(workers)
axes.minorticks_off()
axes.legend()
figure.savefig(sys.argv[2], dpi=120)
