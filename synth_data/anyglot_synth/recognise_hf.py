"""`HFRecogniser`: recognisers of transformers from a local folder: Whisper and the like, or CTC (wav2vec2, HuBERT).

A folder is what `save_pretrained` of a model and its processor write. Nothing is downloaded. Sounds over 28 s are
cut at quiet places first, since Whisper hears 30 s and drops the rest without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from anyglot_synth.backends import BackendError
from anyglot_synth.recognise import Float32, Recogniser
from anyglot_synth.store import sha256_of
from anyglot_tokenizers.errors import AnyglotError

WEIGHTS = (".safetensors", ".bin")


class HFRecogniser(Recogniser):
    """A model of transformers.

    Args:
        path: a local folder with config, weights (safetensors) and processor.
        language: of multilingual models that take one, such as "en"; None lets them guess.
        device: "cpu", "cuda", ...; not part of the identity.
        batch_size: clips at a time for models that hear a fixed window (Whisper). CTC models get clips one by one:
            many of them have no attention mask, and padding would change what they hear.

    Raises:
        AnyglotError: no such folder.
    """

    name = "hf"
    piece_seconds = 28.0

    def __init__(self, path: str, language: str | None = None, device: str = "cpu", batch_size: int = 8) -> None:
        if not (Path(path) / "config.json").is_file():
            raise AnyglotError(f"{path}: there is no config.json; give the local folder of a speech recogniser")
        self.path, self.language, self.device, self.batch_size = path, language, device, batch_size
        self._model: Any = None
        self._processor: Any = None

    @cached_property
    def _identity(self) -> dict[str, Any]:
        files = [p for p in sorted(Path(self.path).iterdir()) if p.suffix in (".json", ".txt", ".model", *WEIGHTS)]
        return {"engine": "hf", "sha256": {p.name: sha256_of(p) for p in files}, "language": self.language}

    def identity(self) -> dict[str, Any]:
        return self._identity

    def setup(self) -> None:
        if self._model is not None:
            return
        try:
            import transformers
        except ImportError as error:
            raise BackendError("transformers is not installed; install it with: pip install 'anyglot[lm]'") from error
        local: dict[str, Any] = {"local_files_only": True}
        try:
            config = transformers.AutoConfig.from_pretrained(self.path, **local)
            ctc = type(config) in transformers.AutoModelForCTC._model_mapping
            auto = transformers.AutoModelForCTC if ctc else transformers.AutoModelForSpeechSeq2Seq
            self._processor = transformers.AutoProcessor.from_pretrained(self.path, **local)
            self._model = auto.from_pretrained(self.path, use_safetensors=True, **local).to(self.device).eval()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BackendError(f"{self.path}: not a speech recogniser of transformers ({error})") from error
        self._ctc = ctc
        self.sample_rate = int(self._processor.feature_extractor.sampling_rate)  # type: ignore[misc]

    def hear(self, audios: Sequence[Float32]) -> list[str]:
        size = 1 if self._ctc else self.batch_size
        return [text for i in range(0, len(audios), size) for text in self._batch(audios[i : i + size])]

    def _batch(self, audios: Sequence[Float32]) -> list[str]:
        import torch

        inputs = self._processor.feature_extractor(
            list(audios), sampling_rate=self.sample_rate, return_tensors="pt"
        ).to(self.device, self._model.dtype)
        with torch.inference_mode():
            if self._ctc:
                return list(self._processor.batch_decode(self._model(**inputs).logits.argmax(-1)))
            options = {"language": self.language} if self.language else {}
            ids = self._model.generate(**inputs, do_sample=False, num_beams=1, **options)
            return list(self._processor.batch_decode(ids, skip_special_tokens=True))
