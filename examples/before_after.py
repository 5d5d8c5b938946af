"""Show two videos of the same size side by side, the first on the left, with the second's sound.

python examples/before_after.py before.mp4 after.mp4 both.mp4
"""

import sys

import av
import numpy as np

before, after, target = sys.argv[1:4]

with av.open(before) as left, av.open(after) as right, av.open(target, "w") as out:
    source = right.streams.video[0]
    video = out.add_stream("libx264", source.average_rate, options={"crf": "18"})
    video.width, video.height, video.pix_fmt = 2 * source.width, source.height, "yuv420p"
    video.time_base = source.time_base
    sound = out.add_stream_from_template(right.streams.audio[0]) if right.streams.audio else None
    lefts = left.decode(left.streams.video[0])
    for packet in right.demux():
        if sound is not None and packet.stream == right.streams.audio[0] and packet.dts is not None:
            packet.stream = sound
            out.mux(packet)
        elif packet.stream == source:
            for frame in source.decode(packet):
                pair = [f.to_ndarray(format="rgb24") for f in (next(lefts), frame)]  # each uint8 [H, W, 3]
                both = av.VideoFrame.from_ndarray(np.concatenate(pair, 1, dtype=np.uint8), format="rgb24")
                both.pts, both.time_base = frame.pts, frame.time_base
                out.mux(video.encode(both))
    out.mux(video.encode(None))

print(f"written to {target}")
