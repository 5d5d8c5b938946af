"""The step of latent optimization, as one feed-forward network: loss, gradient and update.

Legend: N faces, Z latent width, K age classes, S side in pixels, D embedding width.

Compiled engines have no autograd. With frozen weights the gradient with respect to z is itself a feed-forward network
of convolutions, so it is traced once (`gradient_network`) and exported, inside `LatentStep`, like any other network.

Reference: Antipov et al. 2017, arXiv:1702.01983, section 2.3 (pixel-wise and identity-preserving optimization).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from faceage.networks.age_cgan import fold_norm

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
        off, apart = made - x_N3SS, self.identity(made) - e_ND
        # x * x, not a power: that is a slow general one in ONNX Runtime.
        identity = (apart * apart).sum(1)
        pixel = (off * off * self.pixel_weights).mean((1, 2, 3))
        prior = (z_NZ * z_NZ).mean(1)
        return weights_3[0] * identity + weights_3[1] * pixel + weights_3[2] * prior


class LatentStep(nn.Module):
    """One evaluation of loss and gradient at each face's trial point, and what follows from it: the next trial.

    The unknown is u, with z = start + root u: `root` makes all directions about equally curved, so that down the
    gradient is nearly straight to the minimum already. What curvature is left is seen in the last step alone
    (memoryless BFGS); more history gains nothing here. A trial that does not lower the loss enough is halved.

    Faces do not mix, each has its own step length and its own stop, and every shape is fixed: a stopped face stays as
    it is, so a CUDA graph can replay any number of steps without asking the host, and on a CPU the caller may leave
    stopped faces out of the next call.

    The state, first and last of all (N faces): u [N, Z] the best point, loss [N] and gradient [N, Z] (for u) there,
    direction [N, Z] and length [N] of the trial, left [N] the evaluations that the face may still have: 0 is stopped.
    It begins as `first_state`.

    Reference: Nocedal and Wright, Numerical Optimization, 2nd edition: algorithm 7.4 (here with one pair) and 3.1
    (backtracking).
    """

    FIRST_CURVATURE = 3.0
    """Curvature in u along a step down the gradient. `root` makes it 1 on average, but there it is larger: 3 gains most
    on validation faces. A fixed length instead overshoots for a latent that only has to follow a moving face."""
    FIRST_LONGEST = 0.5
    """Longest step down the gradient, in units of u."""
    GUESS = 2.0
    """Length of the first step, which marks it: to gain little by it says that the curvature is not the above (no
    `root` was measured), not that the face has converged."""
    SLIGHTEST = 1e-3
    """Cosine between a step and the gradient's change from which on they tell of the curvature."""
    ARMIJO = 1e-4
    """Share of the linear decrease that a trial must bring (Nocedal and Wright, section 3.1)."""
    SHORTEST = 2.0**-6
    """A face whose trials were refused down to this length has converged as far as float32 goes."""

    def __init__(self, loss_and_gradient: nn.Module) -> None:
        """Take a `gradient_network`, or an `AutogradGradient`."""
        super().__init__()
        self.loss_and_gradient = loss_and_gradient

    def forward(
        self, u: Tensor, loss: Tensor, gradient: Tensor, direction: Tensor, length: Tensor, left: Tensor,
        start: Tensor, y: Tensor, x: Tensor, e: Tensor, settings: Tensor, root: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Return the next state.

        Args:
            u: with `loss`, `gradient`, `direction`, `length` and `left` the state, see above.
            loss: see u.
            gradient: see u.
            direction: see u.
            length: see u.
            left: see u.
            start: [N, Z], where z began.
            y: [N, K], the age classes at which the faces are reconstructed.
            x: [N, 3, S, S], the wanted faces.
            e: [N, D], their embeddings.
            settings: [4], identity, pixel and prior weight, and the tolerance: a face has converged when a step
                lowers its loss by less than this share of it.
            root: [Z, Z].
        """
        step = length[:, None] * direction
        new_loss, slope_z = self.loss_and_gradient(start + (u + step) @ root.T, y, x, e, settings[:3])
        new_gradient = slope_z @ root
        going = left > 0
        enough = new_loss <= loss + self.ARMIJO * length * (gradient * direction).sum(1)
        accepted = going & enough
        # ONNX Runtime knows no `where` of two masks.
        gained_little = accepted & (length < self.GUESS) & (loss - new_loss <= settings[3] * new_loss.abs())
        converged = gained_little | (~accepted & (length <= self.SHORTEST))
        next_length = torch.where(loss > 1e30, self.GUESS, 1.0)  # infinite before the start was evaluated
        new_direction = self._direction(new_gradient, step, new_gradient - gradient)
        rows = accepted[:, None]
        return (
            torch.where(rows, u + step, u),
            torch.where(accepted, new_loss, loss),
            torch.where(rows, new_gradient, gradient),
            torch.where(rows, new_direction, direction),
            torch.where(accepted, next_length, torch.where(going, 0.5 * length, length)),
            torch.where(going & ~converged, left - 1, 0.0),
        )

    def _direction(self, g: Tensor, s: Tensor, c: Tensor) -> Tensor:
        """Return -H g: the two-loop recursion with one pair, of step s and the gradient's change c, written out.

        Before the first step s is 0, and the pair is not used.
        """
        curved, moved, changed = ((a * b).sum(1, keepdim=True) for a, b in ((s, c), (s, s), (c, c)))
        # Where the gradient hardly turns against the step, the pair would throw the face far away.
        usable = curved > self.SLIGHTEST * (moved * changed).sqrt()
        rho = torch.where(usable, 1 / torch.where(usable, curved, 1.0), 0.0)
        # What the inverse of the curvature is like in all directions: between the two usual guesses, s.s / s.c and
        # s.c / c.c; it takes fewer evaluations than either.
        scale = (moved / torch.where(usable, changed, 1.0)).sqrt()
        size = (g * g).sum(1, keepdim=True).clamp(min=1e-20).sqrt()
        scale = torch.where(usable, scale, (self.FIRST_LONGEST / size).clamp(max=1 / self.FIRST_CURVATURE) / self.GUESS)
        alpha = rho * (s * g).sum(1, keepdim=True)
        q = scale * (g - alpha * c)
        return -(q + (alpha - rho * (c * q).sum(1, keepdim=True)) * s)


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


def gradient_network(objective: LatentObjective, examples: tuple[Tensor, ...], *, keep: bool = True) -> fx.GraphModule:
    """Return a network (z, y, x, e, weights) -> (loss [N], d loss / d z [N, Z]) made of plain convolutions.

    Args:
        objective: in eval mode; its weights become constants of the graph.
        examples: inputs whose batch differs from every other axis, for only then is it told apart and stays free.
        keep: fold batch norms here, once; False: in every call, as `FoldedGenerator` does.
    """
    _fold_batch_norms(objective.identity, keep)
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
    return trace(*examples)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, stride: list[int], padding: list[int],
    dilation: list[int], transposed: bool, output_padding: list[int], groups: int, output_mask: list[bool],
) -> tuple[Tensor | None, None, None]:  # fmt: skip
    """Return only the gradient of the input.

    Of a transposed convolution it is the plain one; of a plain one the transposed one, or for stride 1 the plain one
    with the kernel turned.
    """
    if groups != 1 or any(d != 1 for d in dilation):
        raise NotImplementedError("only plain convolutions are used by the networks that are optimized through")
    if not output_mask[0]:
        return None, None, None
    if transposed:
        return F.conv2d(grad, weight, stride=stride, padding=padding), None, None
    kernel = weight.shape[2:]
    if all(s == 1 for s in stride):
        turned = weight.transpose(0, 1).flip(2, 3)
        pad = [k - 1 - p for k, p in zip(kernel, padding, strict=True)]
        return F.conv2d(grad, turned, padding=pad), None, None
    # The rows and columns that the stride left over at the far side get a gradient too.
    extra = [(n + 2 * p - k) % s for n, p, k, s in zip(x.shape[2:], padding, kernel, stride, strict=True)]
    extra = [int(e) for e in extra]
    return F.conv_transpose2d(grad, weight, stride=stride, padding=padding, output_padding=extra), None, None


class _NormedConv(nn.Module):
    """A convolution and the batch norm after it, as one convolution whose weights are folded in every call."""

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.convolution, self.norm = convolution, norm

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = fold_norm(self.convolution, self.norm)
        return F.conv2d(x, weight, bias, self.convolution.stride, self.convolution.padding)


def _fold_batch_norms(network: nn.Module, keep: bool) -> None:
    """Fold each batch norm that directly follows a convolution in a Sequential into it, in place."""
    for module in list(network.modules()):
        if not isinstance(module, nn.Sequential):
            continue
        for i in range(len(module) - 1):
            first, second = module[i], module[i + 1]
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                folded: nn.Module = _NormedConv(first, second)
                if keep:
                    weight, bias = fold_norm(first, second)
                    folded = nn.utils.skip_init(
                        nn.Conv2d, first.in_channels, first.out_channels, first.kernel_size, first.stride, first.padding
                    )
                    folded.weight, folded.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
                module[i], module[i + 1] = folded, nn.Identity()
