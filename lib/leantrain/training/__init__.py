"""Training: the Lightning modules, schedules and small models that chapters share.

The names are loaded when they are first used, because Lightning and timm take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leantrain.training.diverged import Diverged
    from leantrain.training.image_classifier import ImageClassifier
    from leantrain.training.resnet import small_resnet
    from leantrain.training.schedules import warmup_cosine, warmup_cosine_factor
    from leantrain.training.vit import small_vit
    from leantrain.training.weight_store import WeightStore

__all__ = [
    "Diverged",
    "ImageClassifier",
    "WeightStore",
    "small_resnet",
    "small_vit",
    "warmup_cosine",
    "warmup_cosine_factor",
]

_HOME = {
    "Diverged": "diverged",
    "ImageClassifier": "image_classifier",
    "WeightStore": "weight_store",
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
