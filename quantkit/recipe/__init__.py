"""The recipe: what the user asked for, validated and frozen.

A recipe is a YAML file with the sections of :class:`Recipe`. Unknown keys, wrong types and pairs that
cannot work are refused when it is read, before a model is touched, with the path of the key.
"""

from __future__ import annotations

from quantkit.recipe.document import MAX_RECIPE_BYTES, Recipe
from quantkit.recipe.evaluation import (
    ANSWER_METRICS,
    BUNDLED_TEXTS,
    COMPARING_METRICS,
    METRICS,
    AnswerSpec,
    EvaluationSpec,
    Metric,
    SampleSpec,
    TaskSpec,
    TextSpec,
)
from quantkit.recipe.fields import Section
from quantkit.recipe.library import LibrarySpec, LimitsSpec
from quantkit.recipe.mix_budget import MixBudget
from quantkit.recipe.mixing import AutoSpec
from quantkit.recipe.model import AdapterSpec, MergeSpec, ModelSpec
from quantkit.recipe.outputs import (
    BudgetSpec,
    HistorySpec,
    MlflowSpec,
    ReportSpec,
    RetentionSpec,
    TrackingSpec,
    WebhookSpec,
)
from quantkit.recipe.quantization import CalibrationSpec, QuantizationSpec
from quantkit.recipe.recovering import RecoverOptions, RecoverSpec
from quantkit.recipe.scheme import BlocksPatch, SchemeKeys, SchemePatch
from quantkit.recipe.steps import DEFAULT_METHOD
from quantkit.recipe.variant import VariantSpec

__all__ = [
    "ANSWER_METRICS",
    "BUNDLED_TEXTS",
    "COMPARING_METRICS",
    "DEFAULT_METHOD",
    "MAX_RECIPE_BYTES",
    "METRICS",
    "AdapterSpec",
    "AnswerSpec",
    "AutoSpec",
    "BlocksPatch",
    "BudgetSpec",
    "CalibrationSpec",
    "EvaluationSpec",
    "HistorySpec",
    "LibrarySpec",
    "LimitsSpec",
    "MergeSpec",
    "Metric",
    "MixBudget",
    "MlflowSpec",
    "ModelSpec",
    "QuantizationSpec",
    "Recipe",
    "RecoverOptions",
    "RecoverSpec",
    "ReportSpec",
    "RetentionSpec",
    "SampleSpec",
    "SchemeKeys",
    "SchemePatch",
    "Section",
    "TaskSpec",
    "TextSpec",
    "TrackingSpec",
    "VariantSpec",
    "WebhookSpec",
]
