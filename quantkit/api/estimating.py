"""What a quantized model takes, from its config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.recipe.mixing import is_mixed

if TYPE_CHECKING:
    from quantkit.estimation import Estimate


def estimate(
    model: str | Path,
    *,
    method: str | None = None,
    scheme: str | None = None,
    format: str | None = None,  # noqa: A002 - the recipe's word
    dtype: str | None = None,
    train: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> Estimate:
    """What a quantized model takes on disk, while it runs, while it is quantized, and on request while it is trained.

    Nothing but the model's config is read. What fits a card is asked with ``quantkit.estimation.fits`` and ``cards``.

    Args:
        model: a well-known name such as ``llama-3-8b``, a folder, or the name of a hub model.
        method, scheme, format: names, see :func:`quantize`.
        dtype: of the float model; its config's own by default.
        train: estimate QLoRA training too.
        trust_remote_code: run Python code that comes with the model in a folder.
        options: ``batch``, ``context``, ``kv_dtype``, ``lora_rank`` and other keys of
            :class:`quantkit.estimation.Use`, and further keys of a variant.

    Raises:
        QuantkitError: there is no such model, or the variant does not suit it.
    """
    from quantkit.estimation import estimate as estimated

    names: dict[str, Any] = {"method": method, "scheme": scheme, "format": format}
    further: dict[str, Any] = {"dtype": dtype, "train": train, "trust_remote_code": trust_remote_code}
    if is_mixed(options):
        from quantkit.pipeline.estimating import mixed_estimate

        return mixed_estimate(str(model), names, options, **further)
    return estimated(str(model), **names, **further, **options)
