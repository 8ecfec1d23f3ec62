"""What a training makes small: the divergence from the float model, and the error of hidden states."""

from __future__ import annotations

from typing import Any

import torch


class _Divergence(torch.autograd.Function):
    """The divergence, with its gradient made at once: what autograd keeps and passes over is several times as much."""

    @staticmethod
    def forward(context: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        ours, theirs = logits.float().log_softmax(-1), target.exp()
        value: torch.Tensor = (torch.linalg.vecdot(theirs, target) - torch.linalg.vecdot(theirs, ours)).sum()
        if context.needs_input_grad[0]:
            context.save_for_backward(ours.exp_().sub_(theirs).to(logits.dtype))
        return value

    @staticmethod
    def backward(context: Any, *given: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = context.saved_tensors
        return gradient * given[0], None


def divergence(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL divergence summed over tokens, in nats: of the distributions that logits tell from those of the target.

    Args:
        target: log-probabilities, float32 ``[tokens, vocabulary]``.
        logits: ``[tokens, vocabulary]``.
    """
    value: torch.Tensor = _Divergence.apply(logits, target)  # type: ignore[no-untyped-call]  # torch does not type it
    return value


def relative_error(target: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Squared errors of hidden states, each relative to the square of what it should be, summed over tokens, 0-d.

    Args:
        target: ``[tokens, width]``.
        found: likewise.
    """
    wanted = target.float()
    size = wanted.square().sum(-1)
    least = torch.clamp(size.mean() * 1e-6, min=torch.finfo(torch.float32).tiny)
    return ((found.float() - wanted).square().sum(-1) / torch.maximum(size, least)).sum()
