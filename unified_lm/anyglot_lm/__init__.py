"""`anyglot_lm`: the language model side of Anyglot: ids, data, model, loss, decoding.

Importing this package loads no torch, no transformers and no Lightning: the names below
are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyglot_lm.data import PackedDataset as PackedDataset
    from anyglot_lm.data import PlanSampler as PlanSampler
    from anyglot_lm.data import TokenDataModule as TokenDataModule
    from anyglot_lm.patterns import pattern as pattern
    from anyglot_lm.plan import Plan as Plan
    from anyglot_lm.plan import build_plan as build_plan
    from anyglot_lm.segments import CHAT as CHAT
    from anyglot_lm.segments import Sample as Sample
    from anyglot_lm.segments import Segment as Segment
    from anyglot_lm.segments import Template as Template
    from anyglot_lm.shards import ShardReader as ShardReader
    from anyglot_lm.shards import ShardWriter as ShardWriter
    from anyglot_lm.text import TextTokenizer as TextTokenizer
    from anyglot_lm.vocabulary import Block as Block
    from anyglot_lm.vocabulary import BlockSpec as BlockSpec
    from anyglot_lm.vocabulary import Vocabulary as Vocabulary

_HOMES = {
    "CHAT": "segments",
    "Block": "vocabulary",
    "BlockSpec": "vocabulary",
    "PackedDataset": "data",
    "Plan": "plan",
    "PlanSampler": "data",
    "Sample": "segments",
    "Segment": "segments",
    "ShardReader": "shards",
    "ShardWriter": "shards",
    "Template": "segments",
    "TextTokenizer": "text",
    "TokenDataModule": "data",
    "Vocabulary": "vocabulary",
    "build_plan": "plan",
    "pattern": "patterns",
}
__all__ = [
    "CHAT",
    "Block",
    "BlockSpec",
    "PackedDataset",
    "Plan",
    "PlanSampler",
    "Sample",
    "Segment",
    "ShardReader",
    "ShardWriter",
    "Template",
    "TextTokenizer",
    "TokenDataModule",
    "Vocabulary",
    "build_plan",
    "pattern",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
