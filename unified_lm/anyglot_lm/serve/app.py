"""The routes: OpenAI's paths over one unified model.

A handler reads and checks a request, takes places in the queue, has the prompt made in a pool thread, gives it to the
engine's thread and writes what comes back. When its client leaves, its rows end. All heavy work is elsewhere:
the event loop only passes things on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import python_multipart as python_multipart  # what forms need; missing, it is named here
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from anyglot_lm.engine import Engine
from anyglot_lm.grammar import TEXT
from anyglot_lm.serve import answers
from anyglot_lm.serve.batcher import Answer, Batcher, Work
from anyglot_lm.serve.cards import Card
from anyglot_lm.serve.gate import Fork, is_page_path
from anyglot_lm.serve.guard import Guard
from anyglot_lm.serve.limits import Limits
from anyglot_lm.serve.metrics import CONTENT_TYPE_LATEST, Metrics
from anyglot_lm.serve.prepare import Preparer
from anyglot_lm.serve.protocol import (
    ChatRequest,
    ImageRequest,
    SpeechRequest,
    TranscriptionRequest,
    fit,
    parse_json,
)
from anyglot_lm.serve.refusal import OURS, Refusal, error_object
from anyglot_lm.serve.talk import Example
from anyglot_lm.unified import UnifiedModel
from anyglot_tokenizers.errors import AnyglotError

log = logging.getLogger("anyglot.serve")
T = TypeVar("T")
Mark = TypeVar("Mark", ChatRequest, SpeechRequest, ImageRequest)


class Streamed(StreamingResponse):
    """A response in pieces that says when it is over, also where its client left before the first piece."""

    def __init__(self, content: AsyncIterator[bytes], media_type: str, over: Callable[[], None]) -> None:
        super().__init__(content, media_type=media_type, headers={"Cache-Control": "no-store"})
        self.over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.over()


class Service:
    """One model and all that answers with it.

    Args:
        model: the unified model.
        name: that clients call it by.
        limits: see there.
        temperature: see `Preparer`.
    """

    def __init__(self, model: UnifiedModel, name: str, limits: Limits, temperature: float) -> None:
        self.model, self.name, self.limits = model, name, limits
        self.prepare = Preparer(model, limits, temperature)
        engine = Engine(model.model, model.vocabulary, streams=limits.rows, capacity=self.prepare.capacity)
        self.batcher = Batcher(engine, limits.rows + limits.queue, lambda: self.metrics.left.inc())
        self.metrics = Metrics(lambda: self.batcher.in_flight, lambda: self.batcher.waiting)
        self.pool = ThreadPoolExecutor(limits.workers, thread_name_prefix="anyglot-media")
        self.created = int(time.time())

    # what handlers share ----------------------------------------------------------------------------------------

    async def aside(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs a function in a pool thread. When nobody waits for it any more, what it was given is let go at once."""
        call = [partial(function, *arguments)]
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, lambda: call.pop()())
        finally:
            call.clear()  # of a call that is still in the pool's queue, which keeps it until a thread is free

    async def theirs(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs a method of the preparer in a pool thread. What is wrong there is the client's mistake."""
        try:
            return await self.aside(function, *arguments)
        except Refusal:
            raise
        except AnyglotError as error:
            raise Refusal(400, str(error)) from error

    async def work(self, function: Callable[..., Work], *arguments: Any) -> Work:
        """Prepares work, and counts the ids of its prompt."""
        work = await self.theirs(function, *arguments)
        self.metrics.tokens("prompt", answers.counts(self.model.vocabulary, work.prompt))
        return work

    def counted(self, ids: Sequence[int]) -> dict[str, int]:
        """Ids of an answer by modality, also for the metrics."""
        found = answers.counts(self.model.vocabulary, ids)
        self.metrics.tokens("answer", found)
        return found

    async def read(self, request: Request, kind: type[Mark]) -> Mark:
        """The JSON of a request."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "the body must be JSON; send the header Content-Type: application/json")
        asked = parse_json(await request.body(), kind, self.limits)
        self.check_model(asked.model)
        return asked

    def check_model(self, name: str | None) -> None:
        """Raises `Refusal` 404 for another model's name."""
        if name is not None and name != self.name:
            raise Refusal(404, f"no model {name!r} here; use {self.name!r}", param="model", code="model_not_found")

    async def read_form(self, request: Request) -> tuple[TranscriptionRequest, bytes]:
        """Fields and file of a multipart form."""
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise Refusal(415, "the body must be a multipart/form-data form with a file")
        async with request.form(max_files=1, max_fields=16, max_part_size=4096) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise Refusal(400, "the form has no file; send one in the field 'file'", param="file")
            content = await file.read()
            fields = {key: value for key, value in form.multi_items() if key != "file"}
        asked = fit(fields, TranscriptionRequest)
        self.check_model(asked.model)
        return asked, content

    # routes -----------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        asked = await self.read(request, ChatRequest)
        self.prepare.check_n(asked.n)
        form = asked.audio.format
        if asked.stream and form == "flac":
            raise Refusal(400, "audio.format is flac; a stream has pcm16 or wav", param="audio.format")
        with self.batcher.take(asked.n) as ticket:
            work = await while_there(request, self.work(self.prepare.chat, asked))
            rows = ticket.start(work, live=asked.stream)
            if asked.stream:
                return Streamed(self._chunks(asked, work, rows), "text/event-stream", ticket.keep())
            found = [await while_there(request, row.ids()) for row in rows]
            choices = [
                await self.aside(answers.choice, self.model, work, index, ids, form) for index, ids in enumerate(found)
            ]
        used = self._usage(work, found)
        return JSONResponse(self._head("chat.completion") | {"choices": choices, "usage": used})

    async def _chunks(self, asked: ChatRequest, work: Work, rows: Sequence[Answer]) -> AsyncIterator[bytes]:
        """Server-sent events of a chat completion: one choice after the other, though all are written at once."""
        head, found = self._head("chat.completion.chunk"), list[list[int]]()

        def chunk(index: int, delta: dict[str, Any], finish: str | None = None) -> bytes:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
            return answers.server_sent(head | {"choices": [choice]})

        try:
            for index, row in enumerate(rows):
                reader = answers.ChoiceStream(self.model, asked.audio.format, work.request.order or ())
                ids = list[int]()
                yield chunk(index, {"role": "assistant"})
                async for part in row:
                    ids += part
                    for delta in await self.aside(reader.read, part):
                        yield chunk(index, delta)
                yield chunk(index, {}, answers.finish(self.model, work, ids))
                found.append(ids)
        except Exception:  # the status is out already: say it as OpenAI does, inside the stream
            self.metrics.errors.inc()
            log.exception("a defect while streaming a chat completion")
            yield answers.server_sent(error_object(500, OURS))
            return
        used = self._usage(work, found)
        if asked.stream_options.include_usage:
            yield answers.server_sent(head | {"choices": [], "usage": used})
        yield b"data: [DONE]\n\n"

    async def speech(self, request: Request) -> Response:
        """`POST /v1/audio/speech`."""
        asked = await self.read(request, SpeechRequest)
        form, modality = asked.response_format, self.prepare.modality(asked.modality, "modality")
        with self.batcher.take(1) as ticket:
            work = await while_there(request, self.work(self.prepare.speech, asked))
            rate = self.model.tokenizers[modality].spec.sample_rate
            kind = f"audio/{form}" if form != "pcm" else f"audio/pcm; rate={rate}"
            (row,) = ticket.start(work, live=form != "flac")
            if form != "flac":
                return Streamed(self._sound(row, form), kind, ticket.keep())
            ids = await while_there(request, row.ids())
            (output,) = await self.aside(answers.outputs_of, self.model, ids)
            content = await self.aside(answers.sound_bytes, output.media, rate, form)
        self.counted(ids)
        return Response(content, media_type=kind)

    async def _sound(self, row: Answer, form: str) -> AsyncIterator[bytes]:
        reader, ids = answers.SoundStream(self.model, form), list[int]()
        async for part in row:
            ids += part
            if content := await self.aside(reader.read, part):
                yield content
        self.counted(ids)

    async def transcribe(self, request: Request) -> Response:
        """`POST /v1/audio/transcriptions`."""
        asked, content = await self.read_form(request)
        with self.batcher.take(1) as ticket:
            work = await while_there(request, self.work(self.prepare.transcription, asked, content))
            (row,) = ticket.start(work, live=False)
            ids = await while_there(request, row.ids())
        (output,) = answers.outputs_of(self.model, ids)
        used = self._usage(work, [ids])
        if asked.response_format == "text":
            return PlainTextResponse(f"{output.text}\n")
        tokens = {
            "type": "tokens",
            "input_tokens": used["prompt_tokens"],
            "output_tokens": used["completion_tokens"],
            "total_tokens": used["total_tokens"],
        }
        return JSONResponse({"text": output.text, "usage": tokens})

    async def images(self, request: Request) -> Response:
        """`POST /v1/images/generations`."""
        asked = await self.read(request, ImageRequest)
        self.prepare.check_n(asked.n)
        with self.batcher.take(asked.n) as ticket:
            work = await while_there(request, self.work(self.prepare.image, asked))
            rows = ticket.start(work, live=False)
            found = [await while_there(request, row.ids()) for row in rows]
            pictures = [{"b64_json": await self.aside(self._picture, ids)} for ids in found]
        used = self._usage(work, found)
        keys = ("text_tokens", "image_tokens")
        tokens = {
            "input_tokens": used["prompt_tokens"],
            "output_tokens": used["completion_tokens"],
            "total_tokens": used["total_tokens"],
            "input_tokens_details": {key: used["prompt_tokens_details"][key] for key in keys},
        }
        return JSONResponse({"created": int(time.time()), "data": pictures, "usage": tokens})

    def _picture(self, ids: Sequence[int]) -> str:
        (output,) = answers.outputs_of(self.model, ids)
        assert output.media is not None
        return answers.base64_of(answers.png(output.media))

    async def models(self) -> JSONResponse:
        """`GET /v1/models`."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def one_model(self, name: str) -> JSONResponse:
        """`GET /v1/models/{name}`."""
        self.check_model(name)
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        modalities = [TEXT, *self.model.vocabulary.modalities]
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "anyglot",
            "modalities": modalities,
        }

    async def health(self) -> JSONResponse:
        """`GET /health`."""
        good = self.batcher.alive
        return JSONResponse({"status": "ok" if good else "the engine's thread has ended"}, 200 if good else 503)

    async def exposition(self) -> Response:
        """`GET /metrics`."""
        return Response(self.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    def _head(self, kind: str) -> dict[str, Any]:
        name = answers.new_id("chatcmpl")
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.name}

    def _usage(self, work: Work, found: Sequence[Sequence[int]]) -> dict[str, Any]:
        ids = [token for answer in found for token in answer]
        return answers.usage(self.model, answers.counts(self.model.vocabulary, work.prompt), self.counted(ids))


async def while_there(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`; ends it and raises `ClientDisconnect` if the client leaves before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def build_app(
    model: UnifiedModel,
    *,
    name: str = "anyglot",
    limits: Limits | None = None,
    key: str | None = None,
    temperature: float = 0.0,
    hosts: Collection[str] = (),
    examples: Sequence[Example] | None = None,
    cards: Sequence[Card] = (),
) -> FastAPI:
    """The ASGI application; `app.state.service` is its `Service`.

    Args:
        model: the unified model.
        name: that clients call it by.
        limits: of what it takes on.
        key: that clients must send, or None.
        temperature: of requests that name none (0: always the likeliest ids).
        hosts: names that browsers may call this server by, beside localhost and addresses.
        examples: what visitors of the page can try; None leaves the page out.
        cards: what they can record or draw there.

    Raises:
        ImportError: a page without gradio.
    """
    limits = limits or Limits()
    service = Service(model, name, limits, temperature)
    page = None
    if examples is not None:
        from anyglot_lm.serve.page import Page

        page = Page(service, examples, cards)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        try:
            async with page.running() if page is not None else nullcontext():
                yield
        finally:
            await service.batcher.stop()
            service.pool.shutdown(wait=False, cancel_futures=True)

    # No pages of documentation: they would load scripts from elsewhere.
    pages: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(title="anyglot", lifespan=lifespan, redirect_slashes=False, **pages)
    app.state.service = service
    app.state.stop = page.stop if page is not None else lambda: None
    posts = {
        "/v1/chat/completions": service.chat,
        "/v1/audio/speech": service.speech,
        "/v1/audio/transcriptions": service.transcribe,
        "/v1/images/generations": service.images,
    }
    gets = {"/v1/models": service.models, "/health": service.health, "/metrics": service.exposition}
    for path, post in posts.items():
        app.add_api_route(path, post, methods=["POST"], response_model=None)
    for path, get in gets.items():
        app.add_api_route(path, get, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", service.one_model, methods=["GET"], response_model=None)

    async def refuse(_: Request, error: HTTPException) -> Response:
        return Refusal(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()

    app.add_exception_handler(HTTPException, refuse)  # type: ignore[arg-type]
    is_page: Callable[[str], bool] = is_page_path if page is not None else lambda _: False
    if page is not None:
        app.add_middleware(Fork, page=page)
    app.add_middleware(
        Guard,
        limits=limits,
        key=key,
        metrics=service.metrics,
        paths=[*posts, *gets],
        is_page=is_page,
        hosts=hosts,
    )
    return app
