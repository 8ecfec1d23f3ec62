"""An exported checkpoint for others: its model card, and the way to the hub."""

from __future__ import annotations

from quantkit.publishing.card import CARD, CardFacts, card, describe, write_card
from quantkit.publishing.push import push

__all__ = ["CARD", "CardFacts", "card", "describe", "push", "write_card"]
