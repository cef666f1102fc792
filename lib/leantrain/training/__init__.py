"""Training: the Lightning modules, schedules and small models that chapters share.

The names are loaded when they are first used, because Lightning and timm take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leantrain.training.airbench import AirbenchNet
    from leantrain.training.batch_statistics import frozen_statistics
    from leantrain.training.diverged import Diverged
    from leantrain.training.image_classifier import ImageClassifier
    from leantrain.training.language_model import LanguageModel, next_token_loss, perplexity
    from leantrain.training.masked_language_model import (
        MaskedLanguageModel,
        MaskedTransformer,
        PretrainedClassifier,
        mask_tokens,
    )
    from leantrain.training.resnet import small_resnet
    from leantrain.training.resnet9 import ResNet9
    from leantrain.training.schedules import warmup_cosine, warmup_cosine_factor
    from leantrain.training.sequence_classifier import SequenceClassifier
    from leantrain.training.snapshots import Snapshots
    from leantrain.training.vit import small_vit
    from leantrain.training.weight_store import WeightStore

__all__ = [
    "AirbenchNet",
    "Diverged",
    "ImageClassifier",
    "LanguageModel",
    "MaskedLanguageModel",
    "MaskedTransformer",
    "PretrainedClassifier",
    "ResNet9",
    "SequenceClassifier",
    "Snapshots",
    "WeightStore",
    "frozen_statistics",
    "mask_tokens",
    "next_token_loss",
    "perplexity",
    "small_resnet",
    "small_vit",
    "warmup_cosine",
    "warmup_cosine_factor",
]

_HOME = {
    "AirbenchNet": "airbench",
    "Diverged": "diverged",
    "ImageClassifier": "image_classifier",
    "LanguageModel": "language_model",
    "MaskedLanguageModel": "masked_language_model",
    "MaskedTransformer": "masked_language_model",
    "PretrainedClassifier": "masked_language_model",
    "ResNet9": "resnet9",
    "SequenceClassifier": "sequence_classifier",
    "Snapshots": "snapshots",
    "WeightStore": "weight_store",
    "frozen_statistics": "batch_statistics",
    "mask_tokens": "masked_language_model",
    "next_token_loss": "language_model",
    "perplexity": "language_model",
    "small_resnet": "resnet",
    "small_vit": "vit",
    "warmup_cosine": "schedules",
    "warmup_cosine_factor": "schedules",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
