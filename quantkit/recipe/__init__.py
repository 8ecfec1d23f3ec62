"""The recipe: what the user asked for, validated and frozen. One section a file.

A recipe is a YAML file with the sections of :class:`Recipe`. Unknown keys, wrong types and pairs that
cannot work are refused when it is read, before a model is touched, with the path of the key.
"""

from __future__ import annotations

from quantkit.recipe.calibration import CalibrationSpec
from quantkit.recipe.document import MAX_RECIPE_BYTES, Recipe
from quantkit.recipe.evaluation import (
    BUNDLED_TEXTS,
    COMPARING_METRICS,
    METRICS,
    EvaluationSpec,
    Metric,
    TextSpec,
)
from quantkit.recipe.fields import Section
from quantkit.recipe.history import HistorySpec, RetentionSpec
from quantkit.recipe.library import LibrarySpec
from quantkit.recipe.limits import LimitsSpec
from quantkit.recipe.merge import MergeSpec
from quantkit.recipe.model import AdapterSpec, ModelSpec
from quantkit.recipe.options import DEFAULT_METHOD
from quantkit.recipe.quantization import QuantizationSpec
from quantkit.recipe.report import ReportSpec
from quantkit.recipe.scheme import BlocksPatch, SchemeKeys, SchemePatch
from quantkit.recipe.tasks import ANSWER_METRICS, AnswerSpec, TaskSpec
from quantkit.recipe.tracking import MlflowSpec, TrackingSpec
from quantkit.recipe.variant import VariantSpec
from quantkit.recipe.webhook import WebhookSpec

__all__ = [
    "ANSWER_METRICS",
    "BUNDLED_TEXTS",
    "COMPARING_METRICS",
    "DEFAULT_METHOD",
    "MAX_RECIPE_BYTES",
    "METRICS",
    "AdapterSpec",
    "AnswerSpec",
    "BlocksPatch",
    "CalibrationSpec",
    "EvaluationSpec",
    "HistorySpec",
    "LibrarySpec",
    "LimitsSpec",
    "MergeSpec",
    "Metric",
    "MlflowSpec",
    "ModelSpec",
    "QuantizationSpec",
    "Recipe",
    "ReportSpec",
    "RetentionSpec",
    "SchemeKeys",
    "SchemePatch",
    "Section",
    "TaskSpec",
    "TextSpec",
    "TrackingSpec",
    "VariantSpec",
    "WebhookSpec",
]
