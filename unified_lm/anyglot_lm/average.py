"""The weighted mean of models that come of each other: `average`.

A model that was trained on and the one it came from often lie in one basin; between them is a model that keeps what the
second forgot (Wortsman et al. 2022, arXiv 2109.01903). Models that were not trained from one start have no useful mean,
and nothing here can tell.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anyglot_lm.adapter import read_settings
from anyglot_lm.files import new_folder, write_json
from anyglot_lm.unified import UnifiedModel
from anyglot_tokenizers.errors import FingerprintError, ManifestError

RECORD = "average.json"
"""In the folder that is written: whose mean it is."""


def average(
    sources: Sequence[str | Path], weights: Sequence[float], out: str | Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Writes the model folder whose weights are the weighted mean of others'.

    Args:
        sources: two model folders or more, of one vocabulary, template and shape.
        weights: of each, 0 or more, with sum 1.
        out: the folder to write; it appears when it is whole. Config, template, vocabulary and tokenizers are the
            first source's; nothing else is taken over.
        overwrite: replace `out`.

    Returns:
        What `average.json` says: for each source its path as given, weight, and sha256 of its language model's weights.

    Raises:
        CheckpointError, ManifestError: a source that does not load, numbers that are no shares, or `out` exists.
        FingerprintError: a source has other ids than the first.
    """
    import torch

    from anyglot_lm.backbone import stored_dtype

    if len(sources) < 2 or len(weights) != len(sources):
        raise ManifestError(
            f"an average needs two models or more and as many weights, not {len(sources)}, {len(weights)}"
        )
    if min(weights) < 0 or not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise ManifestError(f"the weights {', '.join(map(str, weights))} must be 0 or more and have the sum 1")
    adapted = read_settings(Path(sources[0])) is not None
    stored = torch.float32 if adapted else stored_dtype(sources[0])
    parts = zip(sources, weights, strict=True)
    record = {"mean_of": [{"model": str(s), "weight": w, "sha256": _digest(s)} for s, w in parts]}
    with new_folder(out, overwrite=overwrite) as folder, torch.no_grad():
        first = UnifiedModel.from_pretrained(sources[0])
        mean = dict(first.model.named_parameters())
        for parameter in mean.values():
            parameter.mul_(weights[0])
        for source, weight in zip(sources[1:], weights[1:], strict=True):
            model = UnifiedModel.from_pretrained(source)
            if model.vocabulary.fingerprint != first.vocabulary.fingerprint or model.template != first.template:
                raise FingerprintError(
                    f"{source} has other ids or turns than {sources[0]}; average models of one training"
                )
            if (other := _shape(model)) != (ours := _shape(first)):
                keys = sorted(key for key in {*other, *ours} if other.get(key) != ours.get(key))
                raise ManifestError(
                    f"{source} differs from {sources[0]} in {', '.join(keys)}; average models of one shape"
                )
            theirs = dict(model.model.named_parameters())
            for name, parameter in mean.items():
                parameter.add_(theirs[name], alpha=weight)
        first.model.to(stored)
        first.save_pretrained(folder)
        write_json(folder / RECORD, record)
    return record


def _shape(model: UnifiedModel) -> dict[str, Any]:
    config = model.model.config.to_dict()
    return {
        key: value for key, value in config.items() if key not in ("dtype", "_name_or_path", "transformers_version")
    }


def _digest(source: str | Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(source).glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
