"""`convert`: a publisher's pickled checkpoint, made a folder of safetensors that `load` reads. Once, and when asked.

Nothing else in the package opens a pickle. It is read with PyTorch's restricted unpickler (`weights_only`), which makes
tensors and plain containers and calls nothing else. Checkpoints of training runs also hold objects of the trainer
(Lightning's callbacks, parsed arguments): their classes are not imported, objects without content stand in for them.
Whatever else a file names is refused.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyglot_tokenizers.catalog import UNKNOWN
from anyglot_tokenizers.errors import AnyglotError, CheckpointError
from anyglot_tokenizers.published import PublishedTokenizer
from anyglot_tokenizers.tokenizer import CONFIG_FILE, WEIGHTS_FILE, Tokenizer

KINDS = ("snac", "speechtokenizer", "vqgan", "encodec")
WRAPPERS = ("ema", "model", "state_dict", "generator")
"""Where training runs keep the weights: LlamaGen (averaged weights first, as there), Lightning, SpeechTokenizer."""
TRAINERS = ("argparse.Namespace", "pytorch_lightning.", "lightning.")
"""Classes whose objects are left out."""


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    kind: str | None = None,
    config: str | os.PathLike[str] | dict[str, Any] | None = None,
    *,
    license: str = UNKNOWN,
) -> Tokenizer:
    """Convert a publisher's checkpoint (`.pt`, `.bin`, `.ckpt`, `.th`) to a folder; returns the tokenizer in it.

    Args:
        path: the checkpoint: a state dict, or what a training run wrote around it.
        out: folder to write.
        kind: one of `KINDS`; None = told by the config and the names of the tensors.
        config: the publisher's configuration, as a dict or a JSON or YAML file; None = config.json beside the
            checkpoint, if there is one. VQGAN and EnCodec need none.
        license: of the weights, to be kept with them.

    Raises:
        CheckpointError: the file is missing, damaged, holds more than tensors, or is not a checkpoint of this kind.
    """
    path, out = Path(path), Path(out)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the checkpoint itself")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is a file; choose a folder to write")
    if kind not in (None, *KINDS):
        raise CheckpointError(f"kind {kind!r} is not known; choose one of {', '.join(KINDS)}")
    if kind == "encodec" or (kind is None and path.suffix == ".th"):
        from anyglot_tokenizers.encodec_package import load_th

        tokenizer: Tokenizer = load_th(path, license=license, **(_read_config(path, config) if config else {}))
    else:
        tensors, entries = read_checkpoint(path), _read_config(path, config)
        tokenizer = _published(kind or _guess(tensors, entries, path), tensors, entries, path, license)
    tokenizer.save_pretrained(out)
    return tokenizer


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The named tensors of a pickled checkpoint, on the CPU.

    Raises CheckpointError if it is damaged, wants to run code, or holds tensors that are not plain.
    """
    try:
        with _stand_ins(Path(path)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            raise CheckpointError(f"{path}: refused, since loading it would run {named[1]}") from error
        said = " ".join(re.sub(r"(?s).*WeightsUnpickler error: ", "", str(error)).split("\n")[0].split())[:120]
        raise CheckpointError(
            f"{path}: not a checkpoint of plain tensors ({type(error).__name__}: {said}); get the file again"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not named tensors")
    tensors = {name: x for name, x in content.items() if isinstance(name, str) and isinstance(x, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no named tensors but {sorted(map(str, content))[:5]}")
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if (
            not plain
            or tensor.is_quantized
            or tensor.is_complex()
            or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
        ):
            raise CheckpointError(f"{path}: {name} is not a plain dense tensor")
    return tensors


class _Left:
    """Stands for an object of a trainer; keeps nothing of what the file says of it."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _stand_ins(path: Path) -> Any:
    """Context in which `torch.load` puts `_Left` for the trainer's classes that the file names."""
    if not zipfile.is_zipfile(path):
        return nullcontext()
    names = [str(name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)]
    other = [name for name in names if not name.startswith(TRAINERS)]
    if other:
        raise CheckpointError(f"{path}: refused, since loading it would run {', '.join(other[:5])}")
    return torch.serialization.safe_globals([(_Left, name) for name in names])


def _read_config(path: Path, config: str | os.PathLike[str] | dict[str, Any] | None) -> dict[str, Any]:
    """The publisher's configuration, {} if there is none; that of Lightning is taken out of its `model.params`."""
    if isinstance(config, dict):
        return config
    file = path.with_name(CONFIG_FILE) if config is None else Path(config)
    if config is None and not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        entries = _yaml(text) if file.suffix in (".yaml", ".yml") else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a readable configuration ({error})") from error
    for key in ("model", "params"):
        if isinstance(entries, dict) and isinstance(entries.get(key), dict):
            entries = entries[key]
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: not a table of entries; give the publisher's configuration")
    return entries


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise AnyglotError("reading YAML needs PyYAML: pip install pyyaml") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _guess(tensors: dict[str, Tensor], entries: dict[str, Any], path: Path) -> str:
    if "vq_strides" in entries:
        return "snac"
    if "semantic_dimension" in entries:
        return "speechtokenizer"
    if "quantize.embedding.weight" in tensors:
        return "vqgan"
    raise CheckpointError(f"{path}: neither config nor tensors tell what it is; say --kind {' | '.join(KINDS)}")


def _published(
    kind: str, tensors: dict[str, Tensor], entries: dict[str, Any], path: Path, license: str
) -> PublishedTokenizer:
    """Through a folder in the publisher's layout, which is what the classes read."""
    from safetensors.torch import save_file

    from anyglot_tokenizers.snac import Snac
    from anyglot_tokenizers.speechtokenizer import SpeechTokenizer
    from anyglot_tokenizers.vqgan import VQGAN, is_llamagen

    if kind == "vqgan":
        read: Any = VQGAN.from_published
        entries = {"l2_norm": is_llamagen(tensors), **entries}
    else:
        read = Snac.from_published if kind == "snac" else SpeechTokenizer.from_published
        if not entries:
            raise CheckpointError(f"{path}: needs the publisher's config.json; give it with --config")
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: x.detach().contiguous().clone() for name, x in tensors.items()}, f"{folder}/{WEIGHTS_FILE}")
        try:
            tokenizer: PublishedTokenizer = read(Path(folder), entries, license=license)
            return tokenizer
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {str(error).replace(folder, kind)}") from error
