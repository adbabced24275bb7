"""`Tokenizer`: base class of all tokenizers, their folder form and their fingerprint; `load` finds the right class.

Folder form: `config.json` (class, keyword arguments, spec, fingerprint) and `model.safetensors`. Pickled weights are
never read. Folders in the layout of a publisher go to the class that `catalog.py` names. This file knows no
architecture and no training.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from anyglot_tokenizers.bounds import bounded_by
from anyglot_tokenizers.catalog import MODEL_TYPES, UNKNOWN, home_of, license_of, warn_about, way_to_convert
from anyglot_tokenizers.checks import check_ids
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.errors import AnyglotError, CheckpointError, FingerprintError, UnsupportedError
from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.spec import CodeSpec

if TYPE_CHECKING:
    from anyglot_tokenizers.chunks import Stream
    from anyglot_tokenizers.published import PublishedTokenizer

FORMAT = "anyglot.tokenizer"
VERSION = "1"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PACKAGE = __name__.rpartition(".")[0]
BEFORE_MODULES = {"ImageVQ": f"{PACKAGE}.image", "AudioCodec": f"{PACKAGE}.audio"}
"""Homes of the classes whose folders do not say their module."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What floating weights may be in a folder."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".th")


@dataclass
class Reconstruction:
    """What a training step needs: media as reconstructed (with gradient), codes, commitment loss, code statistics."""

    media: Tensor
    codes: Tensor
    commit_loss: Tensor
    stats: dict[str, Tensor]


class Tokenizer(nn.Module, ABC):
    """Media to codes and back.

    Subclasses hand all their keyword arguments to `Tokenizer.__init__`, build their modules, and give
    `_spec_entries`, `encode`, `decode` and, if they can be trained, `forward`; `to_latents` and `from_latents`, which
    share no parameter, if encoder or decoder can be trained alone. No state is kept between calls.
    """

    _classes: ClassVar[dict[tuple[str, str], type[Tokenizer]]] = {}
    modality: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Tokenizer._classes[cls.__module__, cls.__name__] = cls

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config: dict[str, Any] = json.loads(json.dumps(dict(config)))
        self._fingerprint: tuple[object, str] | None = None

    @abstractmethod
    def _spec_entries(self) -> dict[str, Any]:
        """Entries of `CodeSpec` except the fingerprint."""

    @abstractmethod
    def encode(self, media: Tensor, lengths: Tensor | None = None, *, num_quantizers: int | None = None) -> Codes:
        """Codes of a batch of media; the same whether an item comes alone or padded in a batch."""

    @abstractmethod
    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Media of `Codes`, or of bare ids int64 `[batch, k, *grid]` of the first k <= K quantizers."""

    def forward(self, media: Tensor, lengths: Tensor | None = None) -> Reconstruction:
        """Encode, quantize and decode with gradients, for training."""
        raise UnsupportedError(f"{type(self).__name__} is used as published and cannot be trained here")

    def check_trainable(self) -> None:
        """Raises UnsupportedError if no parameter has a gradient, or neither `forward` nor `to_latents` is there."""
        neither = type(self).forward is Tokenizer.forward and type(self).to_latents is Tokenizer.to_latents
        if neither or not any(parameter.requires_grad for parameter in self.parameters()):
            raise UnsupportedError(
                f"{type(self).__name__} cannot be trained here: it is used as published, or its gradients are off"
            )

    def to_latents(self, media: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the quantizer is given, `[B, D, *grid]` with gradient, and which positions count, bool `[B, *grid]`."""
        raise UnsupportedError(f"{type(self).__name__} gives no latents to train on")

    def from_latents(self, q_BDN: Tensor, counts_BN: Tensor) -> Tensor:
        """Media of quantized latents `[B, D, *grid]`, with gradient, not clamped; `counts_BN` is as of `to_latents`."""
        raise UnsupportedError(f"{type(self).__name__} makes no media of latents to train on")

    def stream(self, batch_size: int = 1, *, num_quantizers: int | None = None) -> Stream:
        """A new stream: media or codes piece by piece, exactly as in one go (see `Stream`).

        Raises UnsupportedError if the codes depend on unbounded context.
        """
        from anyglot_tokenizers.chunks import Stream

        return Stream(self, batch_size, num_quantizers=num_quantizers)

    def fit_statistics(self, media: Tensor) -> None:
        """Adapt input scaling to typical media before the first training step; nothing by default."""

    def _unpack(self, codes: Codes | Tensor, *, empty: bool = False) -> tuple[Tensor, Tensor]:
        """Ids int64 `[batch, k, *grid]`, on this device, and how many count of each item, int64 `[batch]`, on the CPU.

        Raises FingerprintError for codes that say they are of another tokenizer, CodesError for those that cannot be
        of this one; `empty`: the batch or the grid may be.
        """
        codes = codes if isinstance(codes, Codes) else Codes(codes)
        theirs = codes.spec.fingerprint if codes.spec is not None else ""
        if theirs and theirs != self.fingerprint:
            raise FingerprintError(
                f"the codes are of tokenizer {theirs[:12]}, this is {self.fingerprint[:12]}; decode them with theirs"
            )
        entries = self._spec_entries()
        ids = check_ids(codes.codes, entries["codebook_sizes"], entries["axes"], empty=empty).to(self.device)
        counts = torch.tensor(ids.shape[2]).expand(len(ids)) if codes.lengths is None else codes.lengths.cpu()
        return ids, counts

    @property
    def spec(self) -> CodeSpec:
        """Weight-free description, with the fingerprint of the current weights."""
        return CodeSpec(**self._spec_entries(), fingerprint=self.fingerprint)

    @property
    def codebooks(self) -> Tensor | None:
        """Entries of all codebooks, float32 `[K, C, D]`, or None where codes are not entries of such a table."""
        entries = getattr(getattr(self, "quantizer", None), "codebooks", None)
        return entries if isinstance(entries, Tensor) and entries.ndim == 3 else None

    @property
    def factors(self) -> tuple[int, ...] | None:
        """Sizes of the digits that an id of any codebook is made of, the fastest first; None where ids are no numbers
        with digits: then an id means nothing to its neighbours.
        """
        factors: tuple[int, ...] = getattr(getattr(self, "quantizer", None), "factors", ())
        return factors if len(factors) > 1 else None

    @property
    def device(self) -> torch.device:
        """Where the weights are; encode and decode move their input here."""
        return next(self.parameters()).device

    @property
    def fingerprint(self) -> str:
        """sha256 over class, configuration and the values of all stored tensors (whatever their storage dtype).

        In eval mode it is kept until one of them is written to. Writes through `.data` are not seen: call `eval()`
        after them.
        """
        tensors = self._stored_tensors()
        if any(tensor.is_inference() for tensor in tensors.values()):  # writes to these are not seen at all
            return fingerprint_of(type(self).__name__, self.config, tensors)
        key = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors.values())
        if self.training or self._fingerprint is None or self._fingerprint[0] != key:
            self._fingerprint = (key, fingerprint_of(type(self).__name__, self.config, tensors))
        return self._fingerprint[1]

    def train(self, mode: bool = True) -> Self:
        """Switch mode as usual; also forgets the cached fingerprint."""
        self._fingerprint = None
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As usual; also forgets the cached fingerprint."""
        self._fingerprint = None
        return super().load_state_dict(*args, **kwargs)

    def save_pretrained(self, directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> str:
        """Write the folder form; returns the fingerprint of what was written.

        With `dtype` (float16 or bfloat16) floating weights are rounded in the file, never in memory: the
        folder is then a slightly different tokenizer with a fingerprint of its own, so encode data with the
        reloaded one. Raises CheckpointError for weights that are not finite or do not fit the dtype.
        """
        from safetensors.torch import save

        if dtype not in (None, *FLOATS):
            raise CheckpointError(f"cannot save a tokenizer as {dtype}; choose float32, float16 or bfloat16")
        tensors = {}
        for name, tensor in self._stored_tensors().items():
            tensor = tensor.detach().cpu().contiguous()
            if tensor.is_floating_point() and not name.endswith("cluster_size"):
                tensor = tensor.to(dtype or torch.float32)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"{name} holds NaN or infinite values as {tensor.dtype}; not saved: train again or use float32"
                )
            tensors[name] = tensor.clone()
        fingerprint = fingerprint_of(type(self).__name__, self.config, tensors)
        entries = {
            "format": FORMAT,
            "version": VERSION,
            "class": type(self).__name__,
            "module": type(self).__module__,
            "config": self.config,
            "spec": CodeSpec(**self._spec_entries(), fingerprint=fingerprint).to_dict(),
            "fingerprint": fingerprint,
        }
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / WEIGHTS_FILE) as temporary:
            temporary.write_bytes(save(tensors, metadata={"format": "pt"}))
        with atomic_write(folder / CONFIG_FILE) as temporary:
            temporary.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return fingerprint

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """Read a folder, or `owner/name` from the Hugging Face hub. Weights are float32 in memory; eval mode.

        Raises CheckpointError if anything is missing, pickled, of another class, or does not match its
        fingerprint.
        """
        folder, entries, license = _locate(name_or_path, revision)
        if _is_published(entries):
            return cls._from_published(folder, entries, license)
        _check_config(entries, folder)
        found = _find_class(entries, folder)
        if not issubclass(found, cls):
            raise CheckpointError(
                f"{folder}: holds a {found.__name__}, not a {cls.__name__}; use anyglot_tokenizers.load"
            )
        tensors = _read_weights(folder)
        try:
            if found.__module__.startswith(f"{PACKAGE}."):  # classes of others may not be made for "meta"
                with bounded_by(tensors, folder), torch.device("meta"):  # takes no memory, however much is asked for
                    found(**entries["config"])
            with bounded_by(tensors, folder):
                tokenizer = found(**entries["config"])
        except AnyglotError:
            raise
        except Exception as error:  # of whatever kind nonsense causes
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: config does not build a {found.__name__} ({error})"
            ) from error
        tokenizer._take(tensors, folder / WEIGHTS_FILE, str(entries["fingerprint"]))
        warn_about(str(name_or_path), str(tokenizer.config.get("license", UNKNOWN)))
        return tokenizer.eval()

    @classmethod
    def _from_published(cls, folder: Path, entries: dict[str, Any], license: str) -> Self:
        from anyglot_tokenizers.published import PublishedTokenizer

        found = _published_class(entries, folder)
        if not issubclass(found, cls):
            raise CheckpointError(
                f"{folder}: holds a {found.__name__}, not a {cls.__name__}; use anyglot_tokenizers.load"
            )
        assert issubclass(found, PublishedTokenizer)
        tokenizer = found.from_published(folder, entries, license=license)
        warn_about(str(folder), license)
        return tokenizer.eval()

    def push_to_hub(self, repo_id: str, *, private: bool = False, dtype: torch.dtype | None = None) -> str:
        """Upload the folder form to the Hugging Face hub (creating the repository); returns its address."""
        from huggingface_hub import HfApi

        api = HfApi()
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype=dtype)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"Upload {type(self).__name__}")
        return str(address)

    def _stored_tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in sorted(self.state_dict().items()) if not name.endswith("embed_avg")}

    def _take(self, tensors: dict[str, Tensor], path: Path, fingerprint: str) -> None:
        """Load the weights of file `path`. Raises CheckpointError if they are not those this configuration needs."""
        wanted = self._stored_tensors()
        if set(tensors) != set(wanted):
            missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
            raise CheckpointError(
                f"{path}: weights do not fit the config: missing {missing[:3]}, unexpected {extra[:3]}"
            )
        for name, tensor in tensors.items():
            if tensor.shape != wanted[name].shape:
                raise CheckpointError(
                    f"{path}: {name} has shape {list(tensor.shape)}, the config needs {list(wanted[name].shape)}"
                )
            dtypes = FLOATS if wanted[name].is_floating_point() else (wanted[name].dtype,)
            if tensor.dtype not in dtypes:
                raise CheckpointError(f"{path}: {name} is {tensor.dtype}, the config needs {dtypes[0]}")
        actual = fingerprint_of(type(self).__name__, self.config, tensors)
        if actual != fingerprint:
            raise CheckpointError(
                f"{path}: weights or config changed after saving "
                f"(fingerprint {actual[:12]}, recorded {fingerprint[:12]}); get the folder again"
            )
        self.load_state_dict(tensors, strict=False)
        for module in self.modules():
            restore = getattr(module, "restore_averages", None)
            if restore is not None:
                restore()


def load(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Tokenizer:
    """Load any tokenizer from a folder or the Hugging Face hub, in eval mode."""
    return Tokenizer.from_pretrained(name_or_path, revision=revision)


def fingerprint_of(class_name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over class, configuration and tensor values; floating tensors count as float32."""
    digest = hashlib.sha256(json.dumps([FORMAT, VERSION, class_name, config], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initialise weights from `seed` and leave the global random state, also that of GPUs, as it was."""
    gpus = torch.cuda.is_available() and torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if gpus else []):
        if gpus:
            torch.manual_seed(seed)
        else:  # `torch.manual_seed` would also seed GPUs that come into use later
            torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 without autocast and without TF32, so that codes do not depend on the caller's settings.

    TF32 is a setting of the whole process: the first thread to come turns it off, the last to leave turns it back.
    """
    with _ieee if device.type == "cuda" else nullcontext(), torch.autocast(device.type, enabled=False):
        yield


class _Ieee:
    """No TF32 on CUDA, where convolutions would have it by default, while anyone is inside."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, list[str]()

    @property
    def parts(self) -> list[Any]:
        return [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]  # type: ignore[attr-defined]

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.before = [part.fp32_precision for part in self.parts]
                for part in self.parts:
                    part.fp32_precision = "ieee"

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for part, precision in zip(self.parts, self.before, strict=True):
                    part.fp32_precision = precision


_ieee = _Ieee()


def refuse_pickles(folder: Path) -> None:
    """Raises CheckpointError if a folder without safetensors holds pickled weights."""
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder}: refusing pickled weights {pickles}, which can run code; if you trust them: "
            f"anyglot tokenizer convert {folder / pickles[0]} --out DIR"
        )


def _locate(name_or_path: str | os.PathLike[str], revision: str | None) -> tuple[Path, dict[str, Any], str]:
    """Folder, content of its config.json, and licence as the catalogue or the model card says."""
    folder = Path(name_or_path)
    name = str(name_or_path)
    if folder.is_dir():
        return folder, _read_config(folder), _card_license(folder)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or folder.exists():
        raise CheckpointError(f"{name}: no such folder, and not a hub name 'owner/name'")
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        folder = Path(hf_hub_download(name, CONFIG_FILE, revision=revision)).parent
        entries = _read_config(folder)
        if _is_published(entries):
            folder = _published_class(entries, folder).fetch(name, revision)
        else:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except AnyglotError:
        raise
    except Exception as error:  # the hub client raises many kinds: network, login, missing repository, disk
        way = way_to_convert(name) or "check the name and the network"
        raise CheckpointError(
            f"{name}: no such folder, and the hub did not give it ({type(error).__name__}); {way}"
        ) from error
    if (way := way_to_convert(name)) and not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{name}: {way}")
    known = license_of(name)
    return folder, entries, known if known != UNKNOWN else _card_license(folder)


def _card_license(folder: Path) -> str:
    """The `license:` line of the front matter of README.md, or "unknown"."""
    try:
        lines = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:4000].splitlines()
    except OSError:
        return UNKNOWN
    if not lines or lines[0].strip() != "---":
        return UNKNOWN
    found = (line.partition(":")[2].strip() for line in lines[1:] if line.startswith("license:"))
    return next(found, UNKNOWN) or UNKNOWN


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        refuse_pickles(folder)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a readable tokenizer config ({error}); save it again with save_pretrained"
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: not a JSON object; save it again with save_pretrained")
    return entries


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        refuse_pickles(folder)
        raise CheckpointError(f"{path}: no such file; save the tokenizer again with save_pretrained")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:  # the last two: odd dtypes
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}); download or save it again"
        ) from error


def _check_config(entries: dict[str, Any], folder: Path) -> None:
    path = folder / CONFIG_FILE
    if entries.get("format") != FORMAT or entries.get("version") != VERSION:
        refuse_pickles(folder)
        raise CheckpointError(
            f"{path}: not a config of format {FORMAT!r}, version {VERSION!r}; is it another library's model?"
        )
    missing = sorted({"class", "config", "fingerprint"} - set(entries))
    if missing or not isinstance(entries["config"], dict):
        raise CheckpointError(
            f"{path}: entries {missing or ['config']} are missing or wrong; save it again with save_pretrained"
        )


def _find_class(entries: dict[str, Any], folder: Path) -> type[Tokenizer]:
    """The class a folder names: one of this package, or one that the caller has imported before."""
    name = str(entries["class"])
    module = str(entries.get("module", BEFORE_MODULES.get(name, "")))
    if module.startswith(f"{PACKAGE}.") and (module, name) not in Tokenizer._classes:
        try:
            importlib.import_module(module)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"{folder / CONFIG_FILE}: there is no module {module!r}; update anyglot") from error
    if (module, name) in Tokenizer._classes:
        return Tokenizer._classes[module, name]
    theirs = [
        cls for (home, own), cls in Tokenizer._classes.items() if own == name and not home.startswith(f"{PACKAGE}.")
    ]
    if module.startswith(f"{PACKAGE}.") or not theirs:
        raise CheckpointError(
            f"{folder}: unknown tokenizer class {name!r} of module {module!r}; import that module first"
        )
    return theirs[-1]  # its module has another name now, as that of a script has


def _is_published(entries: dict[str, Any]) -> bool:
    return "format" not in entries and ("model_type" in entries or home_of(entries) is not None)


def _published_class(entries: dict[str, Any], folder: Path) -> type[PublishedTokenizer]:
    """The class for a publisher's config.json."""
    home = home_of(entries)
    if home is None:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: model_type {entries.get('model_type')!r} is not a known tokenizer; "
            f"known are {sorted(MODEL_TYPES)}"
        )
    module, _, name = home.partition(":")
    found: type[PublishedTokenizer] = getattr(importlib.import_module(module), name)
    return found
