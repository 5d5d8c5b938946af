"""The objective of latent optimization and its gradient, as feed-forward networks.

Legend: N faces, Z latent width, K age classes, S side in pixels, D embedding width.

Compiled engines have no autograd. With frozen weights the gradient with respect to z is itself a feed-forward network
of convolutions, so it is traced once (`gradient_network`) and exported like any other.

Reference: Antipov et al. 2017, arXiv:1702.01983, section 2.3 (pixel-wise and identity-preserving optimization).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.fusion import fuse_conv_bn_eval

aten = torch.ops.aten


class LatentObjective(nn.Module):
    """How far a generated face is from the wanted one, a face.

        loss = identity_weight * |FR(G(z, y)) - FR(x)|^2
             + pixel_weight * mean(w * (G(z, y) - x)^2) + prior_weight * mean(z^2)

    The paper's pixel-wise optimization is identity_weight 0, its identity-preserving one pixel_weight 0. w is the blend
    mask, scaled to a mean of 1: what lies behind the face is not reconstructed at its expense. The prior keeps z where
    the generator was trained.
    """

    def __init__(self, generator: nn.Module, identity: nn.Module, mask_SS: Tensor) -> None:
        super().__init__()
        self.generator = generator
        self.identity = identity
        self.register_buffer("pixel_weights", (mask_SS / mask_SS.mean()).view(1, 1, *mask_SS.shape))

    def forward(self, z_NZ: Tensor, y_NK: Tensor, x_N3SS: Tensor, e_ND: Tensor, weights_3: Tensor) -> Tensor:
        """Return the loss of each face [N].

        Args:
            z_NZ: the latents.
            y_NK: the age classes at which the face is reconstructed.
            x_N3SS: the wanted faces.
            e_ND: the wanted faces' embeddings.
            weights_3: identity, pixel and prior weight.
        """
        made = self.generator(z_NZ, y_NK)
        identity = (self.identity(made) - e_ND).square().sum(1)
        pixel = ((made - x_N3SS).square() * self.pixel_weights).mean((1, 2, 3))
        prior = z_NZ.square().mean(1)
        return weights_3[0] * identity + weights_3[1] * pixel + weights_3[2] * prior


class AutogradGradient(nn.Module):
    """The same function as `gradient_network`, differentiated by torch at every call."""

    def __init__(self, objective: LatentObjective) -> None:
        super().__init__()
        self.objective = objective.requires_grad_(False)

    def forward(self, z: Tensor, y: Tensor, x: Tensor, e: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss [N] and d loss / d z [N, Z]."""
        with torch.inference_mode(False), torch.enable_grad():
            latents = z.clone().requires_grad_()
            losses = self.objective(latents, *(t.clone() for t in (y, x, e, weights)))
            (gradient,) = torch.autograd.grad(losses.sum(), latents)
        return losses.detach(), gradient


def gradient_network(objective: LatentObjective, examples: tuple[Tensor, ...]) -> fx.GraphModule:
    """Return a network (z, y, x, e, weights) -> (loss [N], d loss / d z [N, Z]) made of plain convolutions.

    Args:
        objective: in eval mode; its weights become constants of the graph.
        examples: inputs whose batch differs from every other axis, for only then is it told apart and stays free.
    """
    _fold_batch_norms(objective)
    for module in list(objective.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Upsample):
                setattr(module, name, _OpaqueDouble())
    objective.requires_grad_(False)

    def loss_and_gradient(z: Tensor, y: Tensor, x: Tensor, e: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        latents = z.detach().requires_grad_()
        losses = objective(latents, y, x, e, weights)
        # Faces do not mix, so the gradient of the sum holds each face's own.
        (gradient,) = torch.autograd.grad(losses.sum(), latents)
        return losses.detach(), gradient

    table = get_decompositions([
        aten.leaky_relu_backward, aten.tanh_backward, aten.native_batch_norm, aten.native_batch_norm_backward,
        aten.linalg_vector_norm,
    ])  # fmt: skip
    table[aten.convolution_backward.default] = _convolution_backward
    trace = make_fx(loss_and_gradient, table, tracing_mode="symbolic", _allow_non_fake_inputs=True)
    graph_module = trace(*examples)
    for node in graph_module.graph.nodes:
        if node.target == torch.ops.faceage.double.default:
            node.target, node.args = aten.upsample_nearest2d.vec, (node.args[0], None, [2.0, 2.0])
    graph_module.recompile()
    return graph_module


@torch.library.custom_op("faceage::double", mutates_args=())
def _double(x: Tensor) -> Tensor:
    """Double by nearest upsampling, in one step: traced with free sizes, torch's own falls apart into gathers."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


@_double.register_fake
def _(x: Tensor) -> Tensor:
    count, channels, height, width = x.shape
    return x.new_empty(count, channels, 2 * height, 2 * width)


# Each source pixel was copied to 2x2 of them, so its gradient is their sum.
_double.register_autograd(lambda _, grad: F.avg_pool2d(grad, 2) * 4)


class _OpaqueDouble(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _double(x)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, stride: list[int], padding: list[int],
    dilation: list[int], transposed: bool, output_padding: list[int], groups: int, output_mask: list[bool],
) -> tuple[Tensor | None, None, None]:  # fmt: skip
    """Return only the gradient of the input: a transposed convolution, or for stride 1 one with the kernel turned."""
    if transposed or groups != 1 or any(d != 1 for d in dilation):
        raise NotImplementedError("only plain convolutions are used by the networks that are optimized through")
    if not output_mask[0]:
        return None, None, None
    kernel = weight.shape[2:]
    if all(s == 1 for s in stride):
        turned = weight.transpose(0, 1).flip(2, 3)
        pad = [k - 1 - p for k, p in zip(kernel, padding, strict=True)]
        return F.conv2d(grad, turned, padding=pad), None, None
    # The rows and columns that the stride left over at the far side get a gradient too.
    extra = [(n + 2 * p - k) % s for n, p, k, s in zip(x.shape[2:], padding, kernel, stride, strict=True)]
    extra = [int(e) for e in extra]
    return F.conv_transpose2d(grad, weight, stride=stride, padding=padding, output_padding=extra), None, None


def _fold_batch_norms(network: nn.Module) -> None:
    """Fold each batch norm that directly follows a convolution in a Sequential into it, in place."""
    for module in network.modules():
        if not isinstance(module, nn.Sequential):
            continue
        for i in range(len(module) - 1):
            first, second = module[i], module[i + 1]
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                module[i] = fuse_conv_bn_eval(first, cast(nn.BatchNorm2d, second))
                module[i + 1] = nn.Identity()
