"""P-Net, rewritten so that ONNX Runtime runs it twice as fast; the same function of the same weights.

PReLU on a wide picture takes ONNX Runtime longer than the convolutions do, because it leaves their blocked
memory layout. Convolutions and ReLU stay in it. With one slope a per channel, PReLU is f(x) = max(x, a x) for
a <= 1 and min(x, a x) above it, so after the pooling

    pool f(x) = f(pool x)                     for a >= 0, where f rises,
              = max(pool x, pool(a x))        for a < 0,
    max(u, v) = u + relu(v - u),   min(u, v) = u - relu(u - v).

The a x of the channels with a < 0 are further outputs of the first convolution: there are six, so its ten
become 16, which is one block. The last PReLU is a x + (1 - a) relu(x), its factors in the heads' weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d, relu


class FastPNet(nn.Module):
    """P-Net from pixels [B, 3, H, W] to offsets [B, 4, h, w] and face probability [B, 1, h, w]."""

    first: Tensor
    first_bias: Tensor
    step: Tensor
    second: Tensor
    second_step: Tensor
    second_bias: Tensor
    slope2: Tensor
    third: Tensor
    third_bias: Tensor
    heads: Tensor
    heads_relu: Tensor
    heads_bias: Tensor

    def __init__(self, weights: dict[str, Tensor]) -> None:
        """Take what `rewrite_pnet` returns."""
        super().__init__()
        for name, value in weights.items():
            self.register_buffer(name, value)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return offsets and face probability."""
        pooled = max_pool2d(conv2d(pixels, self.first, self.first_bias), 2, 2, ceil_mode=True)
        steps = relu(conv2d(pooled, self.step))
        x = conv2d(pooled, self.second, self.second_bias) + conv2d(steps, self.second_step)
        x = conv2d(nn.functional.prelu(x, self.slope2), self.third, self.third_bias)
        heads = conv2d(x, self.heads, self.heads_bias) + conv2d(relu(x), self.heads_relu)
        return heads[:, :4], torch.sigmoid(heads[:, 4:])


def rewrite_pnet(old: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a `FastPNet` that is facenet-pytorch's PNet with the weights `old`."""
    slope, first, second = old["prelu1.weight"], old["conv1.weight"], old["conv2.weight"]
    falling = torch.nonzero(slope < 0)[:, 0]
    sign = torch.where(slope > 1, -1.0, 1.0)
    # The first convolution gives u and, for falling channels, v; `step` makes sign (v - u) of them.
    scale = slope[falling]
    step = torch.diag(torch.where(slope < 0, -1.0, sign * (slope - 1)))
    step = torch.cat([step, torch.eye(len(slope))[:, falling]], 1)
    # The softmax of two classes is the sigmoid of their difference.
    heads, heads_bias = (
        torch.cat([old[f"conv4_2.{part}"], old[f"conv4_1.{part}"][1:] - old[f"conv4_1.{part}"][:1]])
        for part in ("weight", "bias")
    )
    last_slope = old["prelu3.weight"][:, None, None]
    return {
        "first": torch.cat([first, first[falling] * scale[:, None, None, None]]),
        "first_bias": torch.cat([old["conv1.bias"], old["conv1.bias"][falling] * scale]),
        "step": step[..., None, None],
        "second": torch.cat([second, torch.zeros_like(second[:, falling])], 1),
        "second_step": second * sign[:, None, None],
        "second_bias": old["conv2.bias"],
        "slope2": old["prelu2.weight"],
        "third": old["conv3.weight"],
        "third_bias": old["conv3.bias"],
        "heads": heads * last_slope,
        "heads_relu": heads * (1 - last_slope),
        "heads_bias": heads_bias,
    }
