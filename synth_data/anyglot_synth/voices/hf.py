"""`HFVoice`: text-to-speech models of transformers from a user's folder: VITS (with MMS) and SpeechT5.

Only local folders with safetensors are read, so nothing is downloaded and no pickle is opened. Both models draw: every
call sets the seed, and torch's own generator is left as it was. Licences differ by checkpoint (MMS: CC-BY-NC-4.0):
that of the folder's README.md is taken unless one is given.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from anyglot_synth.voices.base import Float32, SpeechBackend, engine_errors, sha256_of_files
from anyglot_synth.voices.programs import SpeechError

_READ = {".json", ".safetensors", ".model", ".txt"}


class HFVoice(SpeechBackend):
    """A model of transformers, on the CPU unless told otherwise.

    Args:
        model: folder of a VITS or SpeechT5 checkpoint, with its tokenizer.
        vocoder: of SpeechT5: folder of its HiFi-GAN.
        speakers: of SpeechT5: folder of x-vectors, a file `NAME.npy` (float `[speaker_embedding_dim]`) per voice.
        voices: of VITS with several speakers their numbers ("0"), of SpeechT5 names of x-vectors; None takes all.
        licence: SPDX name.
        language: BCP-47 tag of what it speaks.
        device: of torch.

    SpeechT5 has a pace of its own: rates other than 1 are refused.
    """

    name: ClassVar[str] = "hf"
    max_characters = 300

    def __init__(
        self,
        model: str,
        vocoder: str | None = None,
        speakers: str | None = None,
        voices: Sequence[str] | None = None,
        licence: str | None = None,
        language: str | None = None,
        device: str = "cpu",
    ) -> None:
        self.model = Path(model)
        self.vocoder, self.speakers = (None if folder is None else Path(folder) for folder in (vocoder, speakers))
        super().__init__(voices, licence or _licence(self.model))
        self.language, self.device = language, device
        self._kind = ""
        self._identity: dict[str, Any] | None = None
        self._engine: tuple[Any, Any, Any] | None = None  # tokenizer, model, vocoder

    @property
    def has_rate(self) -> bool:  # type: ignore[override]
        """Of VITS; SpeechT5 has a pace of its own."""
        return self.kind == "vits"

    @property
    def kind(self) -> str:
        """ "vits" or "speecht5". Raises `SpeechError` for a folder with another model, or none."""
        if not self._kind:
            self._kind = str(self._config().get("model_type"))
            if self._kind not in ("vits", "speecht5"):
                raise SpeechError(f"{self.model}: a model of type {self._kind!r}; give one of VITS (MMS) or SpeechT5")
            if self._kind == "speecht5" and (self.vocoder is None or self.speakers is None):
                raise SpeechError(f"{self.model}: SpeechT5 needs `vocoder` and `speakers`, a folder each")
        return self._kind

    def identity(self) -> dict[str, Any]:
        """Version of transformers and the sha256 of all files that are read."""
        if self._identity is None:
            folders = {"weights": self.model, "vocoder": self.vocoder, "speakers": self.speakers}
            found = {name: _sha256(folder) for name, folder in folders.items() if folder is not None}
            version = importlib.metadata.version("transformers")
            self._identity = {"engine": self.name, "version": f"transformers-{version}", "model": self.kind, **found}
        return self._identity

    def known_voices(self) -> list[dict[str, Any]]:
        """Speakers of the model."""
        if self.kind == "speecht5":
            assert self.speakers is not None
            names = sorted(path.stem for path in self.speakers.glob("*.npy"))
            if not names:
                raise SpeechError(f"{self.speakers}: holds no x-vectors, files NAME.npy")
        else:
            names = [str(number) for number in range(max(1, int(self._config().get("num_speakers", 1))))]
        return [{"voice": name, **({"language": self.language} if self.language else {})} for name in names]

    def setup(self) -> None:
        """Loads the weights."""
        if self._engine is not None:
            return
        known = [voice["voice"] for voice in self.known_voices()]
        with engine_errors(f"{self.model}: cannot be loaded"):
            from transformers import AutoTokenizer, SpeechT5ForTextToSpeech, SpeechT5HifiGan, VitsModel

            only_here = {"local_files_only": True}
            weights = {**only_here, "use_safetensors": True}
            tokenizer = AutoTokenizer.from_pretrained(self.model, **only_here)
            kind = VitsModel if self.kind == "vits" else SpeechT5ForTextToSpeech
            model = kind.from_pretrained(self.model, **weights).eval().to(self.device)
            vocoder = None
            if self.kind == "speecht5":
                vocoder = SpeechT5HifiGan.from_pretrained(self.vocoder, **weights).eval().to(self.device)
                for name in known:
                    self._x_vector(name, model.config.speaker_embedding_dim)
            self._engine = tokenizer, model, vocoder

    def _speak(self, text: str, voice: str, rate: float, pitch: float, seed: int) -> tuple[Float32, int]:
        self.setup()
        self.find_voice(voice)
        assert self._engine is not None
        tokenizer, model, vocoder = self._engine
        with engine_errors(f"{self.model} speaking {text[:60]!r} with voice {voice}"):
            import torch

            ids = tokenizer(text, return_tensors="pt")["input_ids"].to(self.device)
            if not ids.shape[-1] or (self.kind == "vits" and ids.shape[-1] <= 1):
                raise SpeechError(f"{self.model} knows no character of {text[:60]!r}: it speaks another script")
            if self.kind == "vits":
                model.speaking_rate = rate
                several = model.config.num_speakers > 1
                call = partial(model, input_ids=ids, **({"speaker_id": int(voice)} if several else {}))
            else:
                x_vector = torch.from_numpy(self._x_vector(voice, model.config.speaker_embedding_dim))[None]
                call = partial(model.generate_speech, ids, x_vector.to(self.device), vocoder=vocoder)
            devices = [] if self.device == "cpu" else [self.device]
            with torch.random.fork_rng(devices=devices), torch.inference_mode():
                torch.manual_seed(seed)
                made = call()
            audio = (made.waveform[0] if self.kind == "vits" else made).float().cpu().numpy()
            sample_rate = model.config.sampling_rate if self.kind == "vits" else vocoder.config.sampling_rate
        return np.ascontiguousarray(audio), int(sample_rate)

    def _x_vector(self, name: str, size: int) -> Float32:
        assert self.speakers is not None
        path = self.speakers / f"{name}.npy"
        try:
            vector = np.load(path, allow_pickle=False).astype(np.float32).reshape(-1)
        except (OSError, ValueError) as error:
            raise SpeechError(f"{path}: not an x-vector ({error})") from None
        if vector.shape != (size,) or not np.isfinite(vector).all():
            raise SpeechError(f"{path}: an x-vector of {len(vector)} numbers, the model takes {size}")
        return vector

    def _config(self) -> dict[str, Any]:
        path = self.model / "config.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SpeechError(f"{path}: cannot be read ({error}); give the folder of a downloaded model") from None
        return found


def _sha256(folder: Path) -> str:
    suffixes = _READ | {".npy"}
    files = sorted(path for path in folder.glob("*") if path.suffix in suffixes and path.is_file())
    if not files:
        raise SpeechError(f"{folder}: holds no model; give the folder of a downloaded one")
    return sha256_of_files(files)


def _licence(folder: Path) -> str | None:
    """The licence that the head of a model's README.md names."""
    path = folder / "README.md"
    found = re.search(r"^license:\s*(\S+)", path.read_text(errors="replace"), re.MULTILINE) if path.is_file() else None
    return found.group(1) if found else None
