"""The `tune` recipe: go on training a unified model on prepared data, with its own tokenizers and vocabulary.

Takes folders that `anyglot prepare` wrote with the same model (their `shards` are checked against its vocabulary) and
trains the model on them; the result is again a model folder. It adds no modality and evaluates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyglot_recipes.chain import LMConfig, Run, check_lm, train_lm
from anyglot_tokenizers.errors import ManifestError


@dataclass
class TuneConfig:
    """The tune recipe.

    Args:
        run_dir: everything is written below; run again with the same folder to continue.
        seed: of the order of the data.
        model: folder of the model to start from.
        prepared: folders that `anyglot prepare --model MODEL` wrote.
        lm: schedule; its sizes and blocks are the model's own and not read.
    """

    run_dir: str = "runs/tune"
    seed: int = 0
    model: str = ""
    prepared: list[str] = field(default_factory=list)
    lm: LMConfig = field(default_factory=LMConfig)


def tune(config: TuneConfig) -> dict[str, Any]:
    """Train on; returns the final loss and the new model folder."""
    from anyglot_lm.unified import UnifiedModel

    if not config.model or not config.prepared:
        raise ManifestError("tune needs --model DIR and --prepared '[DIR, ...]', folders written by anyglot prepare")
    check_lm(config.lm, new=False)
    model = UnifiedModel.from_pretrained(config.model)
    shards = [Path(folder) / "shards" for folder in config.prepared]
    for path in shards:
        if not path.is_dir():
            raise ManifestError(f"{path}: is missing; write it with anyglot prepare --model {config.model}")
    run = Run(config.run_dir, {k: v for k, v in vars(config).items() if k != "run_dir"})
    folder, loss = train_lm(
        run,
        config.lm,
        shards,
        model.vocabulary,
        model.text,
        model.tokenizers,
        config.seed,
        start=lambda: model.model,
        template=model.template,
    )
    return {"loss": loss, "model": str(folder)}
