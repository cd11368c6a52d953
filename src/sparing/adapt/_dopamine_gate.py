"""The gate of a neuron as a function: soft, hard, or hard with the gradient of the soft one.

Thresholds and gains are float32 and so is what is computed with them, because z - τ loses its
meaning in 16 bits near zero; products return in the type of the activation.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def soft_gate(z: Tensor, tau: Tensor, steepness: Tensor | float) -> Tensor:
    """g = σ(s (z - τ)) (TauGate, eq. 1).

    Arguments:
        z: (..., neurons) pre-activations, any floating type.
        tau: thresholds, float32, (neurons,) or of a shape that spreads to that of z.
        steepness: s.

    Returns:
        (..., neurons) float32, or float64 if z is; between 0 and 1.
    """
    return torch.sigmoid(steepness * (z - tau))


def gated(
    z: Tensor, a: Tensor, tau: Tensor, gain: Tensor, steepness: Tensor, *, hard: bool
) -> Tensor:
    """γ ⊙ g ⊙ a (TauGate, eq. 2), or γ ⊙ 1[z > τ] ⊙ a (eq. 3).

    The gradient is that of the soft gate in both cases (straight-through). For the backward only z
    and a are kept, in their own types; the gate is computed again. That is a sigmoid and three
    products an element and pass.

    Arguments:
        z: (..., neurons) pre-activations, any floating type.
        a: like z, what is gated: φ(z).
        tau: thresholds, float32, (neurons,) or of a shape that spreads to that of z. Minus infinity
            never closes, infinity always does.
        gain: γ, float32, shaped like tau.
        steepness: s, (), or of a shape that spreads to that of z.
        hard: whether the output is that of the hard gate.

    Returns:
        like a. A z that is NaN is not closed, lest the gate hide it.
    """
    return _Gated.apply(z, a, tau, gain, steepness, hard)


class _Gated(torch.autograd.Function):
    # The contexts are untyped because torch's own are.
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, a: Tensor, tau: Tensor, gain: Tensor, steepness: Tensor, hard: bool
    ) -> Tensor:
        ctx.save_for_backward(z, a, tau, gain, steepness)
        ctx.hard = hard
        if hard:
            return (gain * a).masked_fill(z <= tau, 0.0).to(a.dtype)
        return (gain * (soft_gate(z, tau, steepness) * a)).to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, a, tau, gain, steepness = ctx.saved_tensors
        for_z, for_a, for_tau, for_gain, *_ = ctx.needs_input_grad
        soft = soft_gate(z, tau, steepness)
        passed = (z > tau).to(soft.dtype) if ctx.hard else soft
        grad_a = (grad * gain * passed).to(a.dtype) if for_a else None
        grad_gain = (grad * passed * a).sum_to_size(gain.shape) if for_gain else None
        grad_z = grad_tau = None
        if for_z or for_tau:
            # ∂a/∂τ = -s g (1 - g) γ φ(z), and the same upwards through z.
            through = grad * gain * a * (steepness * soft * (1 - soft))
            grad_z = through.to(z.dtype) if for_z else None
            grad_tau = -through.sum_to_size(tau.shape) if for_tau else None
        return grad_z, grad_a, grad_tau, grad_gain, None, None
