"""Filters: stages that measure an item and end it when it is not wanted. Each has a reason, and facts for histograms.

A recipe names a filter and its settings: `{filter: silence, max_share: 0.5}`. Settings, with versions of what measures,
are part of a job's fingerprint. Filters look; none of them changes a dialogue or a file.

Cheap ones come first: `language`, `blocklist` and `pii` read text and belong before anything is made; `near_duplicate`
before everything (it is `ordered`, see its file); then `media`, `duration`, `silence`, `clipping`, `loudness` and
`picture`; then `asr`. Whether a picture shows what should not be seen is not judged here, nor is how speech sounds.
"""

from __future__ import annotations

from typing import Any

from anyglot_synth.registry import Registry
from anyglot_synth.stages import Stage
from anyglot_tokenizers.errors import AnyglotError

FILTERS: Registry[Stage] = Registry("filter", AnyglotError, {
    "asr": "anyglot_synth.filters.asr:AsrFilter",
    "blocklist": "anyglot_synth.filters.text:BlocklistFilter",
    "clipping": "anyglot_synth.filters.sound:ClippingFilter",
    "duration": "anyglot_synth.filters.sound:DurationFilter",
    "language": "anyglot_synth.filters.text:LanguageFilter",
    "loudness": "anyglot_synth.filters.sound:LoudnessFilter",
    "media": "anyglot_synth.filters.media:MediaFilter",
    "near_duplicate": "anyglot_synth.filters.duplicate:NearDuplicateFilter",
    "picture": "anyglot_synth.filters.media:PictureFilter",
    "pii": "anyglot_synth.filters.text:PiiFilter",
    "silence": "anyglot_synth.filters.sound:SilenceFilter",
})  # fmt: skip
"""Name in a recipe -> class, imported on first use."""


def make_filter(config: Any) -> Stage:
    """The filter that a recipe describes: `{"filter": name, **settings}`, or only the name. Raises `AnyglotError`."""
    return FILTERS.make(config, "filters")
