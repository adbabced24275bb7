"""Recognisers: speech to words, for judging what voices made. Each is an open engine with one small interface.

| engine | what | needs |
|---|---|---|
| `sphinx` | pocketsphinx with its package's American English: any text, a word list, a grammar | extra `judge` |
| `nanoworld` | the shipped word recogniser of nanoworld's closed vocabulary | extra `synth` |
| `hf` | Whisper, or CTC models such as wav2vec2, from a local folder | extra `lm` |
| `openai` | any server with `/v1/audio/transcriptions` | a server |

A transcript depends on its clip and nothing else, so filters give the same answers in any order and number of workers
(a server's answers are its own affair). Scores are in `scoring.py`; what a recogniser gets wrong on a voice, and what
follows from that for a threshold, in `calibration.py`.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from anyglot_synth.backends import BackendError, silent
from anyglot_synth.http_client import HttpClient
from anyglot_synth.registry import Registry
from anyglot_synth.store import sha256_of
from anyglot_tokenizers.errors import AnyglotError, MediaError

if TYPE_CHECKING:
    from pocketsphinx import Decoder

Float32 = NDArray[np.float32]

MAX_SECONDS = 3600.0


class Recogniser(ABC):
    """Writes down what it hears. Light until `setup`: it travels to worker processes."""

    name: ClassVar[str]
    sample_rate: ClassVar[int] = 16_000
    """What its engine wants, Hz."""
    piece_seconds: ClassVar[float] = 60.0
    """Longest sound given to the engine at once; longer ones are cut at their quietest places."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON: engine, version, weights (by sha256) and settings. Raises `BackendError` where it is not here."""

    def setup(self) -> None:
        """Loads what is heavy, once per process. Raises `BackendError`."""
        return None

    @abstractmethod
    def hear(self, audios: Sequence[Float32]) -> list[str]:
        """Transcripts of sounds `[samples]` at `sample_rate`, none silent, none longer than `piece_seconds`."""

    def transcribe(self, audios: Sequence[Float32], sample_rate: int) -> list[str]:
        """Transcripts of mono sounds float32 `[samples]`, full scale 1; of silence an empty string.

        Raises:
            MediaError: a sound is not mono, not finite, or longer than an hour.
            BackendError: the engine is not here or broke.
        """
        self.setup()
        cut = [pieces(at_rate(a, sample_rate, self.sample_rate, i), self.sample_rate, self.piece_seconds)
               for i, a in enumerate(audios)]  # fmt: skip
        places = [(i, piece) for i, found in enumerate(cut) for piece in found if not silent(piece)]
        heard: list[list[str]] = [[] for _ in audios]
        for (i, _), words in zip(places, self.hear([piece for _, piece in places]) if places else [], strict=True):
            heard[i].append(words.strip())
        return [" ".join(filter(None, parts)) for parts in heard]


RECOGNISERS: Registry[Recogniser] = Registry("recogniser", AnyglotError, {
    "sphinx": "anyglot_synth.recognise:SphinxRecogniser",
    "nanoworld": "anyglot_synth.recognise:NanoworldRecogniser",
    "hf": "anyglot_synth.recognise_hf:HFRecogniser",
    "openai": "anyglot_synth.recognise:OpenAIRecogniser",
}, key="engine")  # fmt: skip
"""Name in a recipe -> class, imported on first use."""


def make_recogniser(config: Any) -> Recogniser:
    """The one that a recipe describes: `{"engine": name, **settings}`, or only the name. Raises `AnyglotError`."""
    return RECOGNISERS.make(config, "recogniser")


def at_rate(audio: Any, sample_rate: int, wanted: int, number: int = 0) -> Float32:
    """A sound for a recogniser: checked, float32 `[samples]` at the wanted rate. Raises `MediaError`."""
    samples = np.asarray(audio, dtype=np.float32)
    where = f"audio number {number}"
    if samples.ndim != 1:
        raise MediaError(where, f"its shape is {samples.shape}", "give mono audio as an array [samples]")
    if not np.isfinite(samples).all():
        raise MediaError(where, "it holds NaN or infinite samples", "check what made it")
    if len(samples) > MAX_SECONDS * sample_rate:
        raise MediaError(where, f"it lasts {len(samples) / sample_rate:.0f} s", f"cut it to {MAX_SECONDS:.0f} s")
    if sample_rate != wanted and len(samples):
        import soxr

        samples = soxr.resample(samples, sample_rate, wanted, quality="VHQ").astype(np.float32)
    return samples


def pieces(audio: Float32, sample_rate: int, seconds: float) -> list[Float32]:
    """A sound in pieces no longer than `seconds`, each cut in the quietest 50 ms of its last third."""
    limit, frame = int(seconds * sample_rate), max(1, sample_rate // 20)
    found = []
    while len(audio) > limit:
        start = limit * 2 // 3
        num = (limit - start) // frame
        power = (audio[start : start + num * frame].reshape(num, frame) ** 2).mean(axis=1)
        place = start + int(power.argmin()) * frame + frame // 2
        found.append(audio[:place])
        audio = audio[place:]
    return [*found, audio]


class SphinxRecogniser(Recogniser):
    """pocketsphinx (https://github.com/cmusphinx/pocketsphinx, BSD), American English. CPU, 0.4 of real time.

    With its own language model it knows any text, with 7 to 14 % word errors on flite's voices and far more on espeak's
    and on people. A closed task (word list, grammar) is much faster and more reliable: use one where the texts allow.

    Args:
        words: a list of words, or a file with one on each line: any sequence of these is understood, nothing else.
        grammar: JSGF text, or a file of it, with one public rule.

    Raises:
        AnyglotError: both are given; words that its dictionary does not have; a file that cannot be read.
    """

    name = "sphinx"

    def __init__(self, words: Sequence[str] | str | None = None, grammar: str | None = None) -> None:
        if words is not None and grammar is not None:
            raise AnyglotError("sphinx: give words or a grammar, not both")
        self.words = _lines(words) if isinstance(words, str) else None if words is None else sorted(set(words))
        self.grammar = grammar if grammar is None or "#JSGF" in grammar else _read(grammar)
        self._decoder: Decoder | None = None

    def identity(self) -> dict[str, Any]:
        try:
            version = importlib.metadata.version("pocketsphinx")
        except importlib.metadata.PackageNotFoundError as error:
            raise BackendError("pocketsphinx is not installed; install it with: pip install pocketsphinx") from error
        found: dict[str, Any] = {"engine": "sphinx", "version": version, "model": "en-us"}
        return found | {name: value for name in ("words", "grammar") if (value := getattr(self, name)) is not None}

    def setup(self) -> None:
        if self._decoder is not None:
            return
        try:
            from pocketsphinx import Decoder, get_model_path
        except ImportError as error:
            raise BackendError("pocketsphinx is not installed; install it with: pip install pocketsphinx") from error
        closed = self.words is not None or self.grammar is not None
        decoder = Decoder(
            hmm=get_model_path("en-us/en-us"),
            dict=get_model_path("en-us/cmudict-en-us.dict"),
            lm=None if closed else get_model_path("en-us/en-us.lm.bin"),
            cmn="batch",  # "live" carries means over from clip to clip
            samprate=self.sample_rate,
            loglevel="FATAL",
        )
        if closed:
            self._close(decoder)
        self._decoder = decoder

    def _close(self, decoder: Decoder) -> None:
        grammar = self.grammar
        if self.words is not None:
            unknown = [word for word in self.words if decoder.lookup_word(word) is None]
            if unknown:
                raise AnyglotError(
                    f"sphinx: its dictionary has no {', '.join(map(repr, unknown[:10]))}"
                    f"{f' and {len(unknown) - 10} more' if len(unknown) > 10 else ''}; use lower-case English words"
                )
            grammar = f"#JSGF V1.0;\ngrammar words;\npublic <all> = ({' | '.join(self.words)})+;\n"
        try:
            decoder.add_jsgf_string("closed", grammar)
            decoder.activate_search("closed")
        except (RuntimeError, ValueError) as error:
            raise AnyglotError(
                f"sphinx: the grammar cannot be used ({error}); it must be JSGF with one public rule and words that "
                "pocketsphinx' dictionary has"
            ) from error

    def hear(self, audios: Sequence[Float32]) -> list[str]:
        return [self._hear(audio) for audio in audios]

    def _hear(self, audio: Float32) -> str:
        assert self._decoder is not None
        pause = np.zeros(self.sample_rate // 4, np.float32)
        padded = np.concatenate([pause, audio * (0.5 / np.abs(audio).max()), pause])
        _run(self._decoder, np.round(padded * 32767).astype(np.int16).tobytes())
        hypothesis = self._decoder.hyp()
        return "" if hypothesis is None else str(hypothesis.hypstr)

    def align(self, audio: Float32) -> list[tuple[str, list[tuple[str, int, int]]]]:
        """Each word that it hears in audio `[samples]` at 16 kHz, with the (phone, first frame, frames) of its phones.

        Frames are 10 ms; phones are those of its dictionary (ARPAbet without stress). Pauses are words of the phone
        `SIL`. Nothing is cut into pieces: give what fits into memory. Nothing heard, or nothing that can be aligned,
        is an empty list. What its model takes for noise has the phones `+NSN+` and `+SPN+`.

        Raises:
            BackendError: `setup` was not called.
            MediaError: audio that is not mono, or not finite.
        """
        if self._decoder is None:
            raise BackendError("sphinx: call setup() first")
        audio = at_rate(audio, self.sample_rate, self.sample_rate)
        if not len(audio):
            return []
        pcm = (
            np.round(audio * (0.5 / max(float(np.abs(audio).max(initial=0)), 1e-6)) * 32767).astype(np.int16).tobytes()
        )
        decoder, search = self._decoder, self._decoder.current_search()
        _run(decoder, pcm)
        if decoder.hyp() is None:
            return []
        try:
            decoder.set_alignment()
            _run(decoder, pcm)
            words = decoder.get_alignment()
            return [(w.name.split("(")[0], [(p.name, p.start, p.duration) for p in w]) for w in words]
        except RuntimeError:  # the second pass found no path
            return []
        finally:
            decoder.activate_search(search)


class NanoworldRecogniser(Recogniser):
    """`SpeechJudge` of nanoworld: some 40 words, exact and fast.

    Args:
        path: folder of a judge; None takes the one that comes with the package.
    """

    name = "nanoworld"

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._judge: Any = None

    def identity(self) -> dict[str, Any]:
        from anyglot_synth.nanoworld.judge import WEIGHTS

        file = Path(self.path or WEIGHTS) / "model.safetensors"
        try:
            return {"engine": "nanoworld", "sha256": sha256_of(file)}
        except OSError as error:
            raise BackendError(f"{file}: {error.strerror}; give the folder of a judge") from error

    def setup(self) -> None:
        from anyglot_synth.nanoworld.judge import SpeechJudge

        self._judge = self._judge or SpeechJudge.load(self.path)

    def hear(self, audios: Sequence[Float32]) -> list[str]:
        return list(self._judge.transcribe(audios))


class OpenAIRecogniser(Recogniser):
    """A server with `/v1/audio/transcriptions` (OpenAI, vLLM, LocalAI, faster-whisper, `anyglot serve`, ...).

    Args:
        base_url: with `/v1`, such as `http://localhost:8000/v1`.
        model: its name there; part of the identity, so name a version where the server has one.
        language: ISO 639-1 code, sent if given.
        api_key_env: environment variable that holds the key for this server, see `http_client.py`.
        timeout_s: of one attempt at one clip. All should fit into the time for an item (300 s unless a run says
            another).
        tries: attempts per clip.
        wait_s: before the second attempt; about twice that before the third, and so on, up to a minute.
    """

    name = "openai"
    piece_seconds = 300.0

    def __init__(
        self,
        base_url: str,
        model: str,
        language: str | None = None,
        api_key_env: str | None = None,
        timeout_s: float = 50.0,
        tries: int = 5,
        wait_s: float = 1.0,
    ) -> None:
        self.client = HttpClient(base_url, api_key_env, timeout_s, tries, wait_s)
        self.base_url, self.model, self.language = self.client.url, model, language

    def setup(self) -> None:
        self.client.key()

    def identity(self) -> dict[str, Any]:
        return {"engine": "openai", "url": self.base_url, "model": self.model, "language": self.language}

    def hear(self, audios: Sequence[Float32]) -> list[str]:
        return [self._ask(audio) for audio in audios]

    def _ask(self, audio: Float32) -> str:
        fields = {"model": self.model, "response_format": "json", "temperature": "0"}
        body, kind = _form(
            fields | ({"language": self.language} if self.language else {}), _wav(audio, self.sample_rate)
        )
        answer = self.client.post("/audio/transcriptions", body, kind)
        try:
            text = json.loads(answer)["text"]
            if not isinstance(text, str):
                raise TypeError("its text is none")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BackendError(f"{self.base_url}: its answer is no JSON with a text ({error!r})") from None
        return text


def _wav(audio: Float32, sample_rate: int) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.clip(audio, -1, 1), sample_rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def _form(fields: Mapping[str, str], wav: bytes) -> tuple[bytes, str]:
    """(body, content type) of multipart/form-data with one file."""
    mark = uuid.uuid4().hex
    lines = [f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
             for name, value in fields.items()]  # fmt: skip
    head = f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="speech.wav"\r\n'
    lines += [f"{head}Content-Type: audio/wav\r\n\r\n".encode(), wav, f"\r\n--{mark}--\r\n".encode()]
    return b"".join(lines), f"multipart/form-data; boundary={mark}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AnyglotError(f"{path}: cannot be read as a text file ({error})") from error


def _run(decoder: Decoder, pcm: bytes) -> None:
    decoder.start_utt()
    decoder.process_raw(pcm, full_utt=True)
    decoder.end_utt()


def _lines(path: str) -> list[str]:
    return sorted({line.strip() for line in _read(path).splitlines() if line.strip()})
