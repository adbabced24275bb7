"""Sources: streaming readers of text dialogues and of media with captions, by the names that a recipe uses.

`SOURCES["alpaca"](data="alpaca_data.json", form="speech").read(store)` gives `Dialogue`s, and a `BadRow` for each row
that is none, in a stable order, never holding a whole file in memory.
"""

from __future__ import annotations

from anyglot_synth.registry import Registry
from anyglot_synth.sources.base import BadRow, Source, SourceError

SOURCES: Registry[Source] = Registry(
    "source",
    SourceError,
    {
        "alpaca": "anyglot_synth.sources.alpaca:Alpaca",
        "anyinstruct": "anyglot_synth.anyinstruct_source:AnyInstructSource",
        "sharegpt": "anyglot_synth.sources.sharegpt:ShareGpt",
        "llava": "anyglot_synth.sources.llava:Llava",
        "dialogues": "anyglot_synth.sources.dialogues:Dialogues",
        "datasets": "anyglot_synth.sources.hf:HfDatasets",
        "examples": "anyglot_synth.sources.examples:Examples",
        "nanoworld-grammar": "anyglot_synth.grammar_writer:GrammarWriter",
        "nanoworld-tasks": "anyglot_synth.sources.nano:NanoworldTasks",
    },
)
"""Name -> class, imported when it is asked for."""

__all__ = ["SOURCES", "BadRow", "Source", "SourceError"]
