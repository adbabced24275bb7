"""Requests in OpenAI's shapes: what may be asked, and one line for what may not.

An entry that this server does not know is refused, not ignored, unless its value asks for nothing (`null`, `n: 1`,
`frequency_penalty: 0`). Ours beyond OpenAI's: `order` and modalities by the model's names, `modality` of sounds,
`seed`, `temperature` and `top_p` everywhere. This file looks at shapes only; what a modality is, `prepare.py` knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from anyglot_lm.serve.limits import Limits
from anyglot_lm.serve.refusal import Refusal

NOTHING_ASKED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "store": (False,),
    "stop": ([],),
    "tools": ([],),
    "speed": (1,),
    "quality": ("auto", "standard"),
    "background": ("auto",),
    "moderation": ("auto",),
    "output_format": ("png",),
    "stream_format": ("audio",),
    "timestamp_granularities": ([],),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}
"""Values that are the same as leaving the entry out."""

Name = Annotated[str, Field(min_length=1, max_length=128)]
Names = Annotated[list[Name], Field(min_length=1, max_length=16)]


class Shape(BaseModel):
    """Base of all requests: exact types, known entries only."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        return {
            key: value
            for key, value in content.items()
            if value is not None and not any(_same(value, nothing) for nothing in NOTHING_ASKED.get(key, ()))
        }


def _same(value: Any, other: Any) -> bool:
    """Equal, and both true or false or neither: `False` is no number."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


class Text(Shape):
    """A text."""

    type: Literal["text"]
    text: str


class ImageUrl(Shape):
    """Where a picture is: in the URL itself."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class Picture(Shape):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


class SoundData(Shape):
    """A sound as base64."""

    data: str
    format: Literal["wav", "flac", "mp3", "ogg"]
    modality: Name = "audio"


class Sound(Shape):
    """A sound."""

    type: Literal["input_audio"]
    input_audio: SoundData


Part = Annotated[Text | Picture | Sound, Field(discriminator="type")]


class Message(Shape):
    """What one side said. An answer of this server may come back as it is; `name` is accepted and not used."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part] = Field(min_length=1)
    name: str | None = Field(None, max_length=512)

    @model_validator(mode="before")
    @classmethod
    def _own_answer(cls, content: Any) -> Any:
        if isinstance(content, Mapping) and content.get("role") == "assistant" and "order" in content:
            return _said_again(content)
        return content

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


OWN = ("order", "reasoning_content", "audio", "audios", "images")
"""What `answers.choice` adds to a message."""


def _said_again(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of `answers.choice` with its spans as parts, in their order; unchanged where it cannot be one.

    Texts that were joined there stay so, at the place of the first.
    """
    order, thoughts, said = (message.get(key) for key in ("order", "reasoning_content", "content"))
    sounds = message.get("audios") or [message.get("audio")]
    pictures = message.get("images") or []
    if not (isinstance(order, list) and isinstance(sounds, list) and isinstance(pictures, list)) or len(order) > 64:
        return dict(message)
    waiting: list[Any] = [{"type": "text", "text": text} for text in (thoughts, said) if isinstance(text, str) and text]
    waiting += pictures
    waiting += [
        {"type": "input_audio", "input_audio": {"format": "wav", **{k: s[k] for k in ("data", "modality") if k in s}}}
        for s in sounds
        if isinstance(s, Mapping)
    ]

    def kind(part: Any) -> Any:
        sound = part.get("input_audio") if isinstance(part, Mapping) else None
        return sound.get("modality") if isinstance(sound, Mapping) else isinstance(part, Mapping) and part.get("type")

    parts, kinds = [], [kind(part) for part in waiting]
    for name in order:
        wanted = ("text",) if name == "text" else (name, "image_url")  # a sound says its modality, a picture does not
        found = next((kinds.index(exact) for exact in wanted if exact in kinds), None)
        if found is not None:
            kinds.pop(found)
            parts.append(waiting.pop(found))
    return {key: value for key, value in message.items() if key not in OWN} | {"content": [*parts, *waiting]}


class Sampled(Shape):
    """What every request may say. `user` is accepted and not used."""

    model: Name | None = None
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    user: str | None = Field(None, max_length=512)


class AudioOptions(Shape):
    """How sounds of an answer are written. The model has one voice; its name is not looked at."""

    voice: str = Field(default="default", pattern=r"^[A-Za-z0-9_-]{1,64}$")
    format: Literal["wav", "flac", "pcm16"] = "wav"


class StreamOptions(Shape):
    """Extras of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    modalities: Names | None = None
    order: Names | None = None
    audio: AudioOptions = AudioOptions()
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def most(self) -> int | None:
        """Ids of the answer at most. Raises `Refusal` where the two names contradict each other."""
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise Refusal(
                400,
                f"max_tokens is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}; give one",
                param="max_tokens",
            )
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


class SpeechRequest(Sampled):
    """`POST /v1/audio/speech`."""

    input: str = Field(min_length=1)
    voice: str = Field("default", pattern=r"^[A-Za-z0-9_-]{1,64}$")
    response_format: Literal["wav", "flac", "pcm"] = "wav"
    modality: Name = "audio"


class ImageRequest(Sampled):
    """`POST /v1/images/generations`."""

    prompt: str = Field(min_length=1)
    n: int = Field(1, ge=1)
    size: str = Field("auto", pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$")
    response_format: Literal["b64_json"] = "b64_json"


class TranscriptionRequest(Sampled):
    """`POST /v1/audio/transcriptions`, without its file. Fields of a form are strings: numbers are read from them."""

    model_config = ConfigDict(strict=False)
    response_format: Literal["json", "text"] = "json"
    stream: Literal[False, "false", "False"] = False
    modality: Name = "audio"


T = TypeVar("T", bound=Shape)


def parse_json(body: bytes, kind: type[T], limits: Limits) -> T:
    """A request of JSON. Raises `Refusal` 400 for what is none, is too deep, or does not fit."""
    return fit(read_json(body, limits), kind)


def read_json(body: bytes | bytearray, limits: Limits) -> Any:
    """What JSON says. Raises `Refusal` 400 for what is none, has too many values, or is too deep."""
    if sum(body.count(mark) for mark in b",[{") > limits.max_values:
        raise Refusal(400, f"the JSON has more than {limits.max_values} values; send less")
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON ({error}); send one UTF-8 object") from error
    for depth, _ in enumerate(levels(content), 1):
        if depth > limits.max_depth:
            raise Refusal(400, f"the JSON is nested more than {limits.max_depth} deep; send it flatter")
    return content


def levels(content: Any) -> Iterator[list[Any]]:
    """All values of JSON, by how deep they are."""
    level = [content]
    while level:
        yield level
        level = [
            inner
            for value in level
            if isinstance(value, list | dict)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]


def fit(content: Any, kind: type[T]) -> T:
    """Content as a request. Raises `Refusal` 400 that names the first entry that does not fit."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        if first["type"] == "extra_forbidden":
            message = f"{place[:100]} is not supported here; leave it out"
        else:
            message = f"{place[:100] or 'the body'}: {first['msg']}"
        raise Refusal(400, message, param=place[:100] or None) from error
