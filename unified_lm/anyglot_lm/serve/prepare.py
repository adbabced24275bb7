"""`Preparer`: requests to work for the engine: prompts, what the answer may hold, how ids are chosen, seeds.

Runs outside of the event loop, as it decodes and encodes media. Texts become text ids only, whatever they say. What
passes here, the engine can do; every `AnyglotError` is the client's mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from anyglot_lm.chat import turns
from anyglot_lm.engine import Sampling, row_seeds
from anyglot_lm.grammar import TEXT, Request
from anyglot_lm.segments import Role, Sample, Segment
from anyglot_lm.serve.batcher import Work
from anyglot_lm.serve.incoming import decode, from_base64, from_data_uri
from anyglot_lm.serve.limits import Limits
from anyglot_lm.serve.protocol import (
    ChatRequest,
    ImageRequest,
    Message,
    Picture,
    Sampled,
    SpeechRequest,
    Text,
    TranscriptionRequest,
)
from anyglot_lm.serve.refusal import Refusal
from anyglot_lm.unified import MAX_TEXT, UnifiedModel

if TYPE_CHECKING:
    from torch import Tensor

Piece = tuple[Role, str, "str | Tensor"]
"""Who says it, its modality, and the text or medium."""


class Preparer:
    """Prepares requests for one model.

    Args:
        model: the model.
        limits: of what clients send and ask for.
        temperature: of requests for one answer that name none; several answers of a request then get 1.

    Attributes:
        sounds, pictures: the model's modalities of either kind, in its order.
        capacity: ids of prompt and answer at most.
    """

    def __init__(self, model: UnifiedModel, limits: Limits, temperature: float) -> None:
        self.model, self.limits, self.temperature = model, limits, temperature
        specs = {name: model.tokenizers[name].spec for name in model.vocabulary.modalities}
        self.sounds = [name for name, spec in specs.items() if spec.sample_rate is not None]
        self.pictures = [name for name, spec in specs.items() if spec.sample_rate is None and "time" not in spec.axes]
        self.writable = {TEXT, *(name for name in (*self.sounds, *self.pictures) if specs[name].decodes)}
        self.capacity = min(model.max_length, limits.max_ids)

    def modality(self, name: str, param: str) -> str:
        """A modality by the model's name or OpenAI's: "audio" is its first sound, "image" its first picture."""
        if name == TEXT or name in self.sounds or name in self.pictures:
            return name
        for known, found in (("audio", self.sounds), ("image", self.pictures)):
            if name == known and found:
                return found[0]
        names = ", ".join([TEXT, *self.sounds, *self.pictures])
        raise Refusal(400, f"{param} names {name[:100]!r}; this model has {names}", param=param)

    def check_n(self, n: int) -> None:
        """Raises `Refusal` for too many answers."""
        most = min(self.limits.max_n, self.limits.rows + self.limits.queue)
        if n > most:
            raise Refusal(400, f"n is {n}; at most {most} answers a request", param="n")

    def order(self, asked: ChatRequest) -> tuple[str, ...]:
        """Modalities of the answer, one span each, in order."""
        order = [self._writes(name, "order") for name in asked.order or ()]
        given = [self._writes(name, "modalities") for name in asked.modalities or ()]
        if order and given and set(order) != set(given):
            raise Refusal(
                400, "order and modalities name different modalities; give one of them, or the same", param="order"
            )
        chosen = tuple(order or given or (TEXT,))
        self.model.check_request(Request(order=chosen))
        return chosen

    def chat(self, asked: ChatRequest) -> Work:
        """Work of a chat completion."""
        pieces = self._pieces(asked.messages)
        return self._work(pieces, self.order(asked), asked, asked.most, asked.n)

    def speech(self, asked: SpeechRequest) -> Work:
        """Work of a sound that says or plays a text."""
        modality = self._writes(asked.modality, "modality")
        if modality not in self.sounds:
            raise Refusal(400, f"modality is {modality!r}; ask for a sound: {', '.join(self.sounds)}", param="modality")
        self._check_text([asked.input], "input")
        return self._work([("user", TEXT, asked.input)], (modality,), asked)

    def image(self, asked: ImageRequest) -> Work:
        """Work of pictures."""
        modality = self._writes("image", "images")
        side = self.model.image_size(modality)
        if asked.size != "auto" and asked.size != f"{side}x{side}":
            own = "no fixed size" if side is None else f"{side}x{side}"
            raise Refusal(400, f"size is {asked.size}; pictures of this model have {own}: give auto", param="size")
        self._check_text([asked.prompt], "prompt")
        return self._work([("user", TEXT, asked.prompt)], (modality,), asked, n=asked.n)

    def transcription(self, asked: TranscriptionRequest, content: bytes) -> Work:
        """Work of a text that says what a sound does."""
        modality = self.modality(asked.modality, "modality")
        if modality not in self.sounds:
            raise Refusal(400, f"modality is {modality!r}; give a sound: {', '.join(self.sounds)}", param="modality")
        sound = decode(self.model, modality, content, "file", self.limits)
        return self._work([("user", modality, sound)], (TEXT,), asked)

    def turn(self, said: Sequence[Segment], order: Sequence[str], asked: Sampled, most: int | None) -> tuple[Work, int]:
        """Work of the next turn of a conversation, and how many of its oldest segments no longer fit.

        Args:
            said: by both; the last segments are the user's.
            order: modalities of the answer; none leaves them to the model.
            asked: how ids are chosen.
            most: ids of the answer, or None.
        """
        self._check_text((s.content for s in said if isinstance(s.content, str)), "the conversation")
        order = tuple(self._writes(name, "order") for name in order)
        grammar, room = self.model.grammar, min(self.limits.max_answer, self.capacity // 2) if most is None else most
        longest = grammar.longest(self._shape(order, max(room, grammar.shortest(self._shape(order))), cut=most is None))
        for left_out in (0, *turns(said)[1:]):
            prompt = self.model.prompt(Sample(said[left_out:]))
            if len(prompt) + longest <= self.capacity:
                break
        return self._from(prompt, order, asked, most), left_out

    @torch.inference_mode()
    def medium(self, modality: str, content: bytes | Tensor, where: str) -> tuple[Segment, Tensor]:
        """A picture or sound of the user: its codes, and itself as the tokenizer takes it.

        Args:
            modality: of the medium.
            content: of a file, or as the tokenizer takes it.
            where: names it in errors.
        """
        media = decode(self.model, modality, content, where, self.limits) if isinstance(content, bytes) else content
        codes = self.model.encode_media(modality, [media])[0]
        return Segment(modality, codes.numpy(), "user"), media

    def _writes(self, name: str, param: str) -> str:
        modality = self.modality(name, param)
        if modality not in self.writable:
            raise Refusal(400, f"{param} names {name!r}, which this model reads but cannot write", param=param)
        return modality

    def _check_text(self, texts: Iterable[str], param: str) -> None:
        total = sum(map(len, texts))
        if total > self.limits.max_text:
            raise Refusal(
                400, f"{total} characters of text; at most {self.limits.max_text} are read: shorten it", param=param
            )

    def _pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """What was said, texts of a turn joined by newlines."""
        limits = self.limits
        parts = [part for message in messages for part in message.content]
        for count, most, what in (
            (len(messages), limits.max_messages, "messages"),
            (len(parts), limits.max_parts, "parts"),
        ):
            if count > most:
                raise Refusal(400, f"{count} {what}; at most {most} are read: leave old ones out", param="messages")
        self._check_text((part.text for part in parts if isinstance(part, Text)), "messages")
        pieces: list[Piece] = []
        begun = False
        for i, message in enumerate(messages):
            system = message.role in ("system", "developer")
            if system and begun:
                raise Refusal(400, f"messages[{i}] is of role {message.role}; it comes first", param="messages")
            begun |= not system
            role: Role = "assistant" if message.role == "assistant" else "user"
            for j, part in enumerate(message.content):
                where = f"messages[{i}].content[{j}]"
                if isinstance(part, Text):
                    if not part.text:
                        raise Refusal(400, f"{where} is an empty text; say something", param=where)
                    self._append(pieces, role, part.text)
                    continue
                if isinstance(part, Picture):
                    modality = self.modality("image", where)
                    content = from_data_uri(part.image_url.url, f"{where}.image_url.url")
                else:
                    modality = self.modality(part.input_audio.modality, f"{where}.input_audio.modality")
                    if modality not in self.sounds:
                        raise Refusal(400, f"{where}.input_audio.modality is {modality!r}, no sound", param=where)
                    content = from_base64(part.input_audio.data, f"{where}.input_audio.data")
                pieces.append((role, modality, decode(self.model, modality, content, where, limits)))
        if messages[-1].role != "user":
            raise Refusal(400, "the last message is not the user's; there is nothing to answer", param="messages")
        return pieces

    def _work(
        self, pieces: list[Piece], order: tuple[str, ...], asked: Sampled, most: int | None = None, n: int = 1
    ) -> Work:
        return self._from(self.model.prompt(Sample(self._segments(pieces))), order, asked, most, n)

    def _from(self, prompt: list[int], order: tuple[str, ...], asked: Sampled, most: int | None, n: int = 1) -> Work:
        temperature = asked.temperature
        if temperature is None:
            temperature = self.temperature if n == 1 else max(self.temperature, 1.0)
        sampling = dict.fromkeys((TEXT, *self.model.vocabulary.modalities), Sampling(temperature, top_p=asked.top_p))
        return Work(prompt, self._request(order, len(prompt), most), sampling, row_seeds(asked.seed % 2**64, n))

    @torch.inference_mode()
    def _segments(self, pieces: list[Piece]) -> list[Segment]:
        segments = []
        for role, modality, content in pieces:
            if isinstance(content, str):
                segments.append(Segment(TEXT, content, role))
            else:
                codes = self.model.encode_media(modality, [content])[0]
                segments.append(Segment(modality, codes.numpy(), role))
        return segments

    def _request(self, order: tuple[str, ...], prompt: int, most: int | None) -> Request:
        grammar, room = self.model.grammar, min(self.capacity - prompt, self.limits.max_answer)
        needed = max(2, grammar.shortest(self._shape(order)))
        what = " + ".join(order) or "an answer"
        if room < needed:
            raise Refusal(
                400,
                f"the prompt has {prompt} ids and {what} at least {needed}, but there is room for "
                f"{min(self.capacity, prompt + room)}; shorten the conversation",
                param="messages",
                code="context_length_exceeded",
            )
        if most is not None and not needed <= most <= room:
            raise Refusal(
                400,
                f"max_tokens is {most}; {what} has {needed} ids at least, and {room} fit at most",
                param="max_tokens",
            )
        max_ids = room if most is None else most
        return self._shape(order, max_ids, cut=most is None)

    def _shape(self, order: tuple[str, ...], max_ids: int = 1, *, cut: bool = False) -> Request:
        """A request of the grammar; without an order, whatever the model can write."""
        allowed = None if order else frozenset(self.writable)
        longest = {TEXT: min(MAX_TEXT, max_ids)} if cut else {}
        return Request(order=order or None, allowed=allowed, max_ids=max_ids, max_length=longest)

    def _append(self, pieces: list[Piece], role: Role, text: str) -> None:
        """Adds a text, to the one before it if the same side said that, unless it is an answer of several texts."""
        apart = role == "assistant" and self.model.template.tells_texts_apart
        if pieces and pieces[-1][:2] == (role, TEXT) and not apart:
            pieces[-1] = (role, TEXT, f"{pieces[-1][2]}\n{text}")
        else:
            pieces.append((role, TEXT, text))
