"""Data sets by name: found, verified by SHA-256, never silently replaced and never downloaded inside a chapter.

The names are loaded when they are first used, because torch and pandas take seconds to import. Downloading and
verifying are in :mod:`leantrain.data.fetch`, what is known about every set in :mod:`leantrain.data.registry`;
both import neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leantrain.data.checks import duplicates, overlap
    from leantrain.data.detection_sets import DetectionData, DigitScenes, digit_scenes, labelled_pictures
    from leantrain.data.errors import CorruptData, DataError, MissingData
    from leantrain.data.frame_folders import ucf101
    from leantrain.data.image_sets import ImageData, images
    from leantrain.data.sentence_sets import SentenceBatch, SentenceData, sentences
    from leantrain.data.text_sets import table, text
    from leantrain.data.token_sets import TokenData, own_tokens, tokens
    from leantrain.data.video_sets import MovingDigits, VideoData, moving_digits

__all__ = [
    "CorruptData",
    "DataError",
    "DetectionData",
    "DigitScenes",
    "ImageData",
    "MissingData",
    "MovingDigits",
    "SentenceBatch",
    "SentenceData",
    "TokenData",
    "VideoData",
    "digit_scenes",
    "duplicates",
    "images",
    "labelled_pictures",
    "moving_digits",
    "overlap",
    "own_tokens",
    "sentences",
    "table",
    "text",
    "tokens",
    "ucf101",
]

_HOME = {
    "CorruptData": "errors",
    "DataError": "errors",
    "DetectionData": "detection_sets",
    "DigitScenes": "detection_sets",
    "ImageData": "image_sets",
    "MissingData": "errors",
    "MovingDigits": "video_sets",
    "SentenceBatch": "sentence_sets",
    "SentenceData": "sentence_sets",
    "TokenData": "token_sets",
    "VideoData": "video_sets",
    "digit_scenes": "detection_sets",
    "duplicates": "checks",
    "images": "image_sets",
    "labelled_pictures": "detection_sets",
    "moving_digits": "video_sets",
    "overlap": "checks",
    "own_tokens": "token_sets",
    "sentences": "sentence_sets",
    "table": "text_sets",
    "text": "text_sets",
    "tokens": "token_sets",
    "ucf101": "frame_folders",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
