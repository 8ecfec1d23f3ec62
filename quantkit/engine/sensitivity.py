"""What the model's loss says of layers as they are solved: how much each token counts, and what errors cost.

Weights of tokens are what :mod:`quantkit.engine.fisher` found of a token at the outputs of the layers that share an
input, tempered, clipped and of mean 1. Heavy tails leave fewer tokens than there are, which statistics tell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from quantkit.engine.batches import Batch
from quantkit.engine.fisher import Fisher
from quantkit.errors import QuantizationError

CLIPPED = 0.999
"""The quantile of a layer's weights above which all count alike."""


@dataclass(slots=True)
class TokenWeights:
    """The weights of all calibration tokens for the layers of a group.

    Args:
        values: float32 ``[tokens]``.
        starts: see :func:`quantkit.engine.batches.row_starts`.
    """

    values: torch.Tensor
    starts: torch.Tensor
    _by_batch: dict[int, torch.Tensor] = field(default_factory=dict)

    def of(self, batch: Batch, inputs: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
        """The weights of what a layer is given, float32 ``[tokens]``.

        Args:
            batch: whose tokens these are.
            inputs: ``[tokens, in_features]``.
            places: which of them, see :meth:`Batch.tokens_of`.

        Raises:
            QuantizationError: these are not the tokens of the batch, as in a layer that is given some only and nobody
                tells which.
        """
        if id(batch) not in self._by_batch:
            values = self.values[batch.places(self.starts).cpu()]
            self._by_batch[id(batch)] = values.to(batch.token_ids.device)
        own = self._by_batch[id(batch)]
        if places is not None:
            return own.index_select(0, places)
        if len(own) != len(inputs):
            raise QuantizationError(
                f"a layer was given {len(inputs)} of a batch's {len(own)} tokens, so that the weight of each cannot be "
                "told",
                "set calibration.token_weights: 0",
            )
        return own


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What is known of the model's loss when layers are solved.

    Args:
        fisher: what was found of each layer.
        starts: see :func:`quantkit.engine.batches.row_starts`; rows behind those that were looked at are others.
        tokens: how many there are, these among them.
        exponent: to which second moments are raised to weigh tokens by them; 0 weighs all alike.
    """

    fisher: Fisher
    starts: torch.Tensor
    tokens: int
    exponent: float = 0.0

    def weights(self, names: Iterable[str]) -> TokenWeights | None:
        """The weights of tokens for layers that share an input; None where all count alike.

        Each row of the layers counts alike. A token of which nothing is known, as one that experts were not given,
        counts as the mean.
        """
        if self.exponent == 0:
            return None
        known = [each for each in map(self.fisher.layers.get, names) if each is not None and each.tokens is not None]
        rows = sum(len(each.rows) for each in known)
        total = torch.zeros(max(self.tokens, self.fisher.tokens))
        given = torch.zeros(len(total), dtype=torch.bool)
        for each in known:
            places = slice(self.fisher.tokens) if each.places is None else each.places.long()
            if each.tokens is not None:
                total[places] += each.tokens * (len(each.rows) / rows)
            given[places] = True
        if not bool(total.any()):
            return None
        total[given] = tempered(total[given], self.exponent)
        total[~given] = 1.0
        return TokenWeights(total, self.starts)

    def moments(self, name: str) -> TokenWeights | None:
        """How much the loss minds errors of a layer at each token, of mean 1; None where nobody tells tokens apart."""
        known = self.fisher.layers.get(name)
        if known is None or known.tokens is None or not bool(known.tokens.any()):
            return None
        found = torch.zeros(self.fisher.tokens)
        found[slice(None) if known.places is None else known.places.long()] = known.tokens / known.tokens.mean()
        return TokenWeights(found, self.starts)

    def nats(self, name: str, errors: torch.Tensor) -> torch.Tensor | None:
        """By how much errors of a layer are predicted to raise the model's divergence, 0-d, in nats a token.

        Half the sum over rows of the second moment of the gradient times the mean square of the error. None where
        nothing is known of the layer.

        Args:
            name: of the layer.
            errors: float32 ``[out_features]``, the mean over its tokens of the squared error of each output.
        """
        known = self.fisher.layers.get(name)
        if known is None:
            return None
        share = known.seen / self.fisher.tokens
        return (known.rows.to(errors.device) * errors).sum() * (share / 2)


def tempered(moments: torch.Tensor, exponent: float) -> torch.Tensor:
    """Second moments to weights of mean 1: raised to a power, those above a high quantile clipped to it."""
    weights = moments.clamp(min=0).pow(exponent)
    most = weights.sort().values[min(len(weights) - 1, int(CLIPPED * len(weights)))]
    weights = weights.clamp(max=most)
    return weights / weights.mean()
