"""Answers in OpenAI's shapes: ids of a row to messages, chunks of a stream, WAV, FLAC, PCM and PNG, and counts of ids.

All of this decodes or encodes media and runs outside of the event loop, for one row in one place after the other, so
that nothing loses its order. Beyond OpenAI's shape, sounds say their `modality` and `sample_rate`, as not all are
speech at 24 kHz; pictures are in `images`; `order` names the spans of a whole message. A text that another one follows
at once (the transcript in a chain) is `reasoning_content`, as other servers call text before the answer.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from anyglot_lm.grammar import TEXT
from anyglot_lm.serve.batcher import Work
from anyglot_lm.stream import AnswerReader, Event
from anyglot_lm.unified import Output, UnifiedModel
from anyglot_lm.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

STREAMED = 0xFFFFFFFF
"""The size in the head of a WAV whose end is not known yet."""


# bytes of media -----------------------------------------------------------------------------------------------------


def pcm16(audio: Tensor) -> bytes:
    """float `[channels, samples]` as interleaved 16-bit little-endian samples."""
    samples: bytes = (audio.T.numpy().clip(-1, 1) * 32767).round().astype("<i2").tobytes()
    return samples


def wav_head(rate: int, channels: int, size: int = STREAMED) -> bytes:
    """The head of a 16-bit WAV.

    Args:
        rate: samples a second.
        channels: of the sound.
        size: bytes of samples that follow.
    """
    whole = size if size == STREAMED else size + 36
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * channels * 2, channels * 2, 16)
    return struct.pack("<4sI4s", b"RIFF", whole, b"WAVE") + form + struct.pack("<4sI", b"data", size)


def sound_bytes(audio: Tensor, rate: int, form: str) -> bytes:
    """A whole sound as `form`: wav, flac, or pcm16 (also called pcm)."""
    if form == "flac":
        import soundfile

        file = io.BytesIO()
        soundfile.write(file, audio.T.numpy().clip(-1, 1), rate, format="FLAC", subtype="PCM_16")
        return file.getvalue()
    samples = pcm16(audio)
    return (wav_head(rate, len(audio), len(samples)) if form == "wav" else b"") + samples


def png(image: Tensor) -> bytes:
    """float `[3, H, W]` in [0, 1] as PNG."""
    from PIL import Image

    file = io.BytesIO()
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG")
    return file.getvalue()


def base64_of(content: bytes) -> str:
    """As JSON holds bytes."""
    return base64.b64encode(content).decode("ascii")


def image_url(image: Tensor) -> dict[str, Any]:
    """A picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_of(png(image))}"}}


# whole answers ------------------------------------------------------------------------------------------------------


def outputs_of(model: UnifiedModel, ids: Sequence[int]) -> list[Output]:
    """The spans of an answer, media decoded."""
    spans = model.grammar.parse(ids)
    media = [None if s.modality == TEXT else model.decode_media(s.modality, [s.content])[0] for s in spans]
    return [model.output(span, medium) for span, medium in zip(spans, media, strict=True)]


def choice(model: UnifiedModel, work: Work, index: int, ids: Sequence[int], form: str) -> dict[str, Any]:
    """One choice of a chat completion.

    Args:
        model: that wrote the ids.
        work: what was asked.
        index: of the choice.
        ids: of the answer, eos included.
        form: of sounds.
    """
    outputs = outputs_of(model, ids)
    order = [output.modality for output in outputs]
    texts = [output.text or "" for i, output in enumerate(outputs) if output.modality == TEXT and not _leads(order, i)]
    thoughts = [output.text or "" for i, output in enumerate(outputs) if _leads(order, i)]
    sounds = [_sound(model, output, form, "".join(texts)) for output in outputs if _is_sound(model, output)]
    pictures = [image_url(o.media) for o in outputs if o.media is not None and not _is_sound(model, o)]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(texts) if texts else None,
        "refusal": None,
        "order": order,
    }
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if sounds:
        message["audio"] = sounds[0]
    if len(sounds) > 1:
        message["audios"] = sounds
    if pictures:
        message["images"] = pictures
    return {"index": index, "message": message, "logprobs": None, "finish_reason": finish(model, work, ids)}


def _leads(order: Sequence[str], place: int) -> bool:
    """Whether a span is a text that another text follows."""
    return tuple(order[place : place + 2]) == (TEXT, TEXT)


def _is_sound(model: UnifiedModel, output: Output) -> bool:
    return output.modality != TEXT and model.tokenizers[output.modality].spec.sample_rate is not None


def _rate(model: UnifiedModel, modality: str) -> int:
    rate = model.tokenizers[modality].spec.sample_rate
    assert rate is not None, f"{modality} is no sound"
    return rate


def _sound(model: UnifiedModel, output: Output, form: str, transcript: str) -> dict[str, Any]:
    assert output.media is not None
    rate = _rate(model, output.modality)
    return {
        "id": new_id("audio"),
        "data": base64_of(sound_bytes(output.media, rate, form)),
        "expires_at": int(time.time()),  # nothing is kept
        "transcript": transcript,
        "modality": output.modality,
        "sample_rate": rate,
    }


def finish(model: UnifiedModel, work: Work, ids: Sequence[int]) -> str:
    """Why an answer ended: "length" where it, or a text in it, had no room for more, else "stop"."""
    request = work.request
    longest = request.max_length.get(TEXT, request.max_ids)
    texts = [len(span.content) for span in model.grammar.parse(ids) if span.modality == TEXT]
    full = len(ids) >= request.max_ids > model.grammar.shortest(request)
    return "length" if full or max(texts, default=0) >= longest else "stop"


def counts(vocabulary: Vocabulary, ids: Sequence[int]) -> dict[str, int]:
    """Ids by modality; controls count as text, start and end ids as what they enclose."""
    array, found = np.asarray(ids), {TEXT: len(ids)}
    for block in vocabulary.blocks:
        inside = (array >= block.end_id) & (array < block.stop_id) | (array == block.start_id)
        found[block.modality] = int(inside.sum())
        found[TEXT] -= found[block.modality]
    return found


def usage(model: UnifiedModel, prompt: Mapping[str, int], answer: Mapping[str, int]) -> dict[str, Any]:
    """OpenAI's usage of a chat completion: counts by modality, and of all sounds and pictures together."""

    def details(found: Mapping[str, int]) -> dict[str, int]:
        sounds = {m for m in model.vocabulary.modalities if model.tokenizers[m].spec.sample_rate is not None}
        summed = {
            "audio_tokens": sum(count for m, count in found.items() if m in sounds),
            "image_tokens": sum(count for m, count in found.items() if m != TEXT and m not in sounds),
        }
        return {f"{modality}_tokens": count for modality, count in found.items()} | summed

    asked, written = sum(prompt.values()), sum(answer.values())
    return {
        "prompt_tokens": asked,
        "completion_tokens": written,
        "total_tokens": asked + written,
        "prompt_tokens_details": details(prompt) | {"cached_tokens": 0},
        "completion_tokens_details": details(answer) | {"reasoning_tokens": 0},
    }


def new_id(kind: str) -> str:
    """A name for an answer or a sound; nothing is ever found by it."""
    return f"{kind}-{uuid.uuid4().hex}"


# streams ------------------------------------------------------------------------------------------------------------


def server_sent(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


class ChoiceStream:
    """Ids of one choice in, deltas of `chat.completion.chunk`s out.

    Args:
        model: that writes the ids.
        form: of sounds: pcm16, or wav (each sound then begins with a head of unknown length).
        order: of the answer's spans.
    """

    def __init__(self, model: UnifiedModel, form: str, order: Sequence[str]) -> None:
        self.model, self.form, self.reader = model, form, AnswerReader(model)
        self.order, self.span = order, 0
        self.audio_id = ""
        self.spoken = False

    def read(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Deltas of the next ids."""
        return [delta for event in self.reader.read(ids) for delta in self._deltas(event)]

    def _deltas(self, event: Event) -> list[dict[str, Any]]:
        if event.kind == "text":
            return [{"reasoning_content" if _leads(self.order, self.span) else "content": event.text}]
        if event.kind == "start" and _leads(self.order, self.span):
            before = any(_leads(self.order, span) for span in range(self.span))
            return [{"reasoning_content": "\n"}] if before else []  # as `choice` joins them
        self.span += event.kind == "end"
        if event.kind == "start" and event.modality != TEXT:
            self.audio_id, self.spoken = new_id("audio"), False
        if event.kind == "audio" and event.media is not None:
            return [self._audio(event.modality, event.media)]
        if event.kind == "end" and event.output is not None and event.output.media is not None:
            if not _is_sound(self.model, event.output):
                return [{"images": [image_url(event.output.media)]}]
            whole = [] if self.spoken else [self._audio(event.modality, event.output.media)]
            return [*whole, {"audio": {"id": self.audio_id, "expires_at": int(time.time())}}]
        return []

    def _audio(self, modality: str, audio: Tensor) -> dict[str, Any]:
        rate, content = _rate(self.model, modality), pcm16(audio)
        about: dict[str, Any] = {"id": self.audio_id}
        if not self.spoken:
            self.spoken = True
            about |= {"modality": modality, "sample_rate": rate}
            content = (wav_head(rate, len(audio)) if self.form == "wav" else b"") + content
        return {"audio": about | {"data": base64_of(content)}}


class SoundStream:
    """Ids of an answer that is one sound in, its bytes out.

    Args:
        model: that writes the ids.
        form: wav (of unknown length) or pcm.
    """

    def __init__(self, model: UnifiedModel, form: str) -> None:
        self.model, self.form, self.reader = model, form, AnswerReader(model)
        self.spoken = False

    def read(self, ids: Sequence[int]) -> bytes:
        """Bytes of the next ids."""
        return b"".join(map(self._bytes, self.reader.read(ids)))

    def _bytes(self, event: Event) -> bytes:
        media = event.media
        if event.kind == "end" and not self.spoken and event.output is not None:
            media = event.output.media
        if event.kind not in ("audio", "end") or media is None:
            return b""
        head = b"" if self.spoken or self.form != "wav" else wav_head(_rate(self.model, event.modality), len(media))
        self.spoken = True
        return head + pcm16(media)
