"""The page beside the API: a chat with the model in a browser, made with gradio.

It answers through the same batcher, queue and limits as the API (`talk.py`); what guards it is in `gate.py`. gradio is
imported when a `Page` is made. This file lays the page out and passes on what happens there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from anyglot_lm.grammar import TEXT
from anyglot_lm.serve import cards, spans, talk
from anyglot_lm.serve.cards import Card
from anyglot_lm.serve.gate import Gate, sweep, temporary_folder
from anyglot_lm.serve.incoming import decode, from_data_uri, is_picture
from anyglot_lm.serve.protocol import ChatRequest, fit
from anyglot_lm.serve.refusal import OURS, Refusal
from anyglot_lm.serve.talk import Conversation, Example, Given, Turn

if TYPE_CHECKING:
    from anyglot_lm.serve.app import Service

log = logging.getLogger("anyglot.serve")
KEPT_SECONDS, CLEANED_SECONDS = 900, 300
"""For which a file that was sent is kept, and between two looks for older ones."""
VISITORS, VISIT_SECONDS = 256, 3600
"""Conversations in memory, and for how long after the last turn."""
MAX_SHOWN = 4 * 2**20
"""Characters of the messages of a visit, with their media, beyond its last turn; the oldest turns go."""
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


class Visit:
    """What the server keeps of one visitor: the conversation, and the messages that show it."""

    def __init__(self) -> None:
        self.conversation = Conversation()
        self.messages: list[dict[str, Any]] = []

    def add(self, turn: list[dict[str, Any]]) -> None:
        """Adds the messages of a turn: the assistant's, and mostly the user's before it."""
        self.messages = [*self.messages, *turn]
        sizes = [sum(len(content) for _, content in message["content"]) for message in self.messages]
        while len(self.messages) > len(turn) and sum(sizes) > MAX_SHOWN:
            oldest = 2 if self.messages[0]["role"] == "user" else 1
            del self.messages[:oldest], sizes[:oldest]


class Page:
    """The page of one server, as an ASGI application.

    Args:
        service: what answers.
        examples: what visitors can try at once.
        cards: what they can record or draw, and get an answer at once.

    Raises:
        ImportError: gradio is not installed.
    """

    def __init__(self, service: Service, examples: Sequence[Example], cards: Sequence[Card] = ()) -> None:
        folder = temporary_folder()  # before gradio, which reads its place when it is imported
        import gradio

        self.service, self.gradio, self.examples, self.cards = service, gradio, list(examples), list(cards)
        names = {"image": service.prepare.pictures, "sound": service.prepare.sounds}
        self.kinds = {kind: modalities for kind, modalities in names.items() if modalities}
        self.host = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        theme = gradio.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONT, font_mono=MONO)
        theme.set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")
        gradio.mount_gradio_app(
            self.host,
            self._blocks(),
            path="/",
            app_kwargs={"exception_handlers": {Refusal: _refuse}},
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size=service.limits.max_body,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=theme,
            css=STYLE + SHEETS,
        )
        self.app = Gate(self.host, folder, service.limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        await self.app(scope, receive, send)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the server runs."""
        async with self.host.router.lifespan_context(self.host):
            sweeper = asyncio.create_task(self._sweep())
            try:
                yield
            finally:
                sweeper.cancel()
                sweep(self.app.folder, 0.0)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(CLEANED_SECONDS)
            await asyncio.to_thread(sweep, self.app.folder, KEPT_SECONDS)

    def stop(self) -> None:
        """Ends the connections that browsers hold open; without that, a stopping server waits for them."""
        for route in self.host.routes:
            if (event := getattr(getattr(route, "app", None), "stop_event", None)) is not None:
                event.set()

    # the layout ---------------------------------------------------------------------------------------------------

    def _blocks(self) -> Any:
        gr, prepare = self.gradio, self.service.prepare
        with gr.Blocks(
            title=self.service.name,
            analytics_enabled=False,
            fill_width=True,
        ) as blocks:
            visit = gr.State(Visit(), time_to_live=VISIT_SECONDS, delete_callback=_leave)
            gr.HTML(self._head(), elem_id="ag-head")
            with gr.Row(visible=bool(self.cards), elem_id="ag-cards"):
                inputs = [self._card(card) for card in self.cards]
            with gr.Row(equal_height=False):
                with gr.Column(scale=3, min_width=320):
                    chat = gr.Chatbot(
                        show_label=False,
                        height="calc(100vh - 440px)",
                        min_height=520 if self.cards else 340,
                        layout="bubble",
                        buttons=[],
                        render_markdown=False,
                        allow_tags=False,
                        latex_delimiters=[],
                        placeholder=f"Say something to {escape(self.service.name)}.",
                        elem_id="ag-chat",
                    )
                    with gr.Row(visible=bool(self.examples), elem_id="ag-examples"):
                        tries = [gr.Button(e.title, size="sm", min_width=120) for e in self.examples]
                    box = gr.MultimodalTextbox(
                        show_label=False,
                        placeholder="Write, or add a picture or a sound",
                        sources=["upload", "microphone"] if prepare.sounds else ["upload"],
                        file_types=[{"image": "image", "sound": "audio"}[kind] for kind in self.kinds] or [".none"],
                        file_count="multiple",
                        max_plain_text_length=self.service.limits.max_text,
                        elem_id="ag-box",
                    )
                    with gr.Row(equal_height=True, elem_id="ag-how"):
                        order = gr.Dropdown(
                            [name for name in (TEXT, *prepare.model.vocabulary.modalities) if name in prepare.writable],
                            multiselect=True,
                            label="The answer is",
                            info="nothing chosen: as the model likes; several: in this order",
                            scale=3,
                            elem_id="ag-order",
                        )
                        kinds = [
                            gr.Radio(
                                names,
                                value=names[0],
                                label=f"A{'n' if kind[0] in 'aeiou' else ''} {kind} I send is",
                                visible=len(names) > 1,
                                elem_id=f"ag-kind-{kind}",
                                scale=2,
                            )
                            for kind, names in self.kinds.items()
                        ]
                    with gr.Row():
                        stop = gr.Button("Stop", interactive=False, size="sm", elem_id="ag-stop")
                        new = gr.Button("New conversation", size="sm", elem_id="ag-new")
                with gr.Column(scale=2, min_width=320):
                    panel = gr.HTML(_side(NOTHING), elem_id="ag-panel")
                    with gr.Accordion("Settings", open=False):
                        temperature = gr.Slider(
                            0, 2, prepare.temperature, step=0.05, label="Temperature", info="0: the likeliest ids"
                        )
                        with gr.Row():
                            seed = gr.Number(0, precision=0, label="Seed", info="the same seed, the same answer")
                            most = gr.Number(
                                0, precision=0, minimum=0, label="Most ids of the answer", info="0: what fits"
                            )

            hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
            how = [temperature, seed, most]
            self.look: dict[str, Any] = {
                "visit": visit,
                "chat": chat,
                "box": box,
                "stop": stop,
                "new": new,
                "panel": panel,
            }
            outputs = list(self.look.values())
            box.submit(self.say, [visit, box, order, *how, *kinds], outputs, **hidden)
            at_once = [(e, button) for e, button in zip(self.examples, tries, strict=True)]
            for card, (box_of_card, buttons) in zip(self.cards, inputs, strict=True):
                begun = box_of_card.submit if card.sketch else box_of_card.stop_recording
                begun(self._at_once(card, box_of_card), [visit, *how, box_of_card], [*outputs, box_of_card], **hidden)
                gr.on([begun, *(button.click for button in buttons)], js=SHOW_CHAT, **hidden)
                at_once += zip(card.examples, buttons, strict=True)
            for example, button in at_once:
                button.click(self._at_once(example), [visit, *how], outputs, **hidden)
            stop.click(_stop, [visit], None, **hidden)
            gr.on([new.click, chat.clear], self.clear, [visit], outputs, **hidden)
        blocks.queue(default_concurrency_limit=None)
        blocks.state_session_capacity = VISITORS
        return blocks

    def _card(self, card: Card) -> tuple[Any, list[Any]]:
        """The input of a card, and the buttons of its examples."""
        gr = self.gradio
        with gr.Column(min_width=320, elem_classes="ag-card"):
            gr.HTML(f"<h2>{escape(card.title)}</h2><p>{escape(card.hint)}</p>")
            if card.sketch is None:
                box = gr.Audio(sources=["microphone"], type="filepath", show_label=False, buttons=[], editable=False)
            else:
                script, sketch = cards.SCRIPT, card.sketch
                html = sketch.html(card.action)
                box = gr.HTML(html_template=html, js_on_load=script, apply_default_css=False, sketch=sketch.props())
            gr.HTML("<p>Or try:</p>", visible=bool(card.examples))
            with gr.Row(visible=bool(card.examples)):
                buttons = [gr.Button(e.title, size="sm", min_width=120) for e in card.examples]
        return box, buttons

    def _head(self) -> str:
        model = self.service.model
        count = sum(weight.numel() for weight in model.model.parameters())
        named = ", ".join((TEXT, *model.vocabulary.modalities))
        size = f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
        return (
            f"<header class='ag-head'><h1>{escape(self.service.name)}</h1>"
            f"<p>One language model for {escape(named)} · {size} parameters · {model.vocabulary.size} ids</p></header>"
        )

    # what happens ---------------------------------------------------------------------------------------------------

    async def say(
        self, visit: Visit, said: Any, order: Any, temperature: Any, seed: Any, most: Any, *kinds: Any
    ) -> AsyncIterator[dict[Any, Any]]:
        """The visitor sends what is in the box."""
        chosen = dict(zip(self.kinds, kinds, strict=True))

        async def given() -> list[Given]:
            return await self.service.theirs(in_the_box, said or {}, chosen, order or [])

        text = (said or {}).get("text") or ""
        async for look in self._talk(visit, given, order or [], (temperature, seed, most), text):
            yield look

    def _at_once(self, what: Example | Card, box: Any = None) -> Callable[..., AsyncIterator[dict[Any, Any]]]:
        """Answers an example, or what is in the box of a card, in a new conversation."""

        async def run(visit: Visit, temperature: Any, seed: Any, most: Any, content: Any = None) -> Any:
            async def given() -> list[Given]:
                if isinstance(what, Example):
                    return list(what.given)
                return [await self.service.theirs(self._of_card, what, content)]

            if visit.conversation.ticket is None:
                visit.conversation, visit.messages = Conversation(), []
            async for look in self._talk(visit, given, what.order, (temperature, seed, most), ""):
                yield look if box is None or (isinstance(what, Card) and what.sketch) else look | {box: None}

        return run

    def _of_card(self, card: Card, content: Any) -> Given:
        """What was recorded or drawn."""
        if not isinstance(content, str):
            raise Refusal(400, "nothing was recorded or drawn")
        if card.sketch is not None:
            return Given(card.modality, from_data_uri(content, "the drawing"), "the drawing")
        sound = decode(self.service.model, card.modality, _read(Path(content)), "the recording", self.service.limits)
        return Given(card.modality, card.tidy(sound) if card.tidy else sound)

    async def clear(self, visit: Visit) -> dict[Any, Any]:
        """The visitor begins a new conversation."""
        visit.conversation.stop()
        visit.conversation, visit.messages = Conversation(), []
        return self._look(visit, [], panel=_side(NOTHING))

    async def _talk(
        self, visit: Visit, given: Callable[[], Any], order: Sequence[str], how: tuple[Any, ...], text: str
    ) -> AsyncIterator[dict[Any, Any]]:
        """One turn. A mistake of the visitor is an answer of one line; the text goes back into the box."""
        if visit.conversation.ticket is not None:
            self.gradio.Warning("The answer before this one is still being written; stop it, or wait.")
            return
        conversation, turn, note = visit.conversation, Turn(self.service.model), ""
        visit.messages = [message | {"content": talk.quiet(message["content"])} for message in visit.messages]
        try:
            asked, most = _asked(*how)
            async for turn in talk.answer(self.service, conversation, given, order, asked, most):
                if visit.conversation is conversation:
                    panel = self._panel(turn) if turn.prompt else None
                    yield self._look(visit, _messages(turn), panel=panel, running=True)
            if turn.left_out:
                note = "The oldest turns no longer fit; the model does not see them any more."
            if not turn.whole:
                note = "Stopped. The model will not remember this turn."
        except Refusal as refusal:
            note = f"{str(refusal)[:1].upper()}{str(refusal)[1:]}."
        except Exception:
            self.service.metrics.errors.inc()
            log.exception("a defect while answering on the page")
            note = f"{OURS.capitalize()}."
        if visit.conversation is not conversation:  # a new one has begun; gradio shows the last look once more
            yield self._look(visit, [], panel=None, running=visit.conversation.ticket is not None)
            return
        if not turn.prompt:  # refused, or stopped before it was clear that it fits: its media are not kept
            turn.asked = [(kind, content) for kind, content in turn.asked if kind == "text"]
        if not turn.asked and text:
            turn.asked.append(("text", text))
        elif turn.whole:
            text = ""
        visit.add(_messages(turn, note))
        panel = self._panel(turn) if turn.prompt else None
        back = None if turn.prompt else {"text": text, "files": []}
        yield self._look(visit, [], panel=panel, box=back)

    def _panel(self, turn: Turn) -> str:
        model = self.service.model

        def decode(ids: list[int]) -> str:
            return model.text.decode([token for token in ids if token < model.text.size])

        parts = [("Prompt", turn.prompt), ("Answer", turn.ids)]
        read = [(title, spans.read_spans(model.vocabulary, decode, ids)) for title, ids in parts if ids]
        return _side(spans.spans_html(model.vocabulary, read))

    def _look(
        self, visit: Visit, more: list[dict[str, Any]], *, panel: str | None, running: bool = False, box: Any = None
    ) -> dict[Any, Any]:
        gr, look = self.gradio, self.look
        found = {
            look["visit"]: visit,  # set anew, so that its hour begins anew
            look["chat"]: [self._shown(message) for message in [*visit.messages, *more]],
            look["box"]: gr.MultimodalTextbox(value=box, interactive=not running),
            look["stop"]: gr.Button(interactive=running, variant="stop" if running else "secondary"),
        }
        return found if panel is None else found | {look["panel"]: panel}

    def _shown(self, message: dict[str, Any]) -> dict[str, Any]:
        # gradio takes a text of a message for HTML, and cleans it; here a text shows what it says
        pieces = [
            f"<div class='ag-text'>{escape(content)}</div>" if kind == "text" else content
            for kind, content in message["content"]
            if content
        ]
        return {"role": message["role"], "content": [self.gradio.HTML(piece, render=False) for piece in pieces]}


def in_the_box(said: dict[str, Any], chosen: dict[str, str], order: Sequence[str] = ()) -> list[Given]:
    """What is in the box: the files as they were added, then the text, a question about them.

    Where a picture is asked for the text comes first: it says what to do with what follows.

    Args:
        said: "text", and paths of "files".
        chosen: "image" and "sound", those that the model reads -> the modality that such a file is.
        order: modalities of the answer.
    """
    text = (said.get("text") or "").strip()
    words = [Given(TEXT, text)] if text else []
    found = []
    for path in map(Path, said.get("files") or ()):
        content = _read(path)
        kind = "image" if is_picture(content) else "sound"
        if kind not in chosen:
            raise Refusal(400, f"{path.name} is no {' and no '.join(chosen) or 'text'}; this model reads nothing else")
        found.append(Given(chosen[kind], content, path.name))
    return [*words, *found] if chosen.get("image") in order else [*found, *words]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        raise Refusal(400, f"{path.name} is no longer here; add it again") from None


def _asked(temperature: Any, seed: Any, most: Any) -> tuple[Any, int | None]:
    """The settings, checked as those of a request."""
    entries = {"temperature": temperature, "seed": seed or 0, "max_tokens": most or None}
    asked = fit({"messages": [{"role": "user", "content": "-"}], **entries}, ChatRequest)
    return asked, asked.most


def _messages(turn: Turn, note: str = "") -> list[dict[str, Any]]:
    answer = list(turn.answer)
    if note:
        answer.append(("html", f"<p class='ag-note'>{escape(note)}</p>"))
    elif not answer:
        answer.append(("html", "<p class='ag-wait'>…</p>"))
    asked = [{"role": "user", "content": list(turn.asked)}] if turn.asked else []
    return [*asked, {"role": "assistant", "content": answer}]


async def _stop(visit: Visit) -> None:
    """The visitor stops the answer."""
    visit.conversation.stop()


def _leave(visit: Visit) -> None:
    """The visitor has left for long."""
    visit.conversation.stop()


async def _refuse(_: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return refusal.response()


def _side(content: str) -> str:
    return f"<div class='ag-side'><h2>What the model saw and said</h2>{content}</div>"


NOTHING = "<p class='ag-nothing'>The ids of the prompt and of the answer appear here, coloured by what they are.</p>"
SHOW_CHAT = "() => document.querySelector('#ag-chat').scrollIntoView({behavior: 'smooth', block: 'nearest'})"
SHEETS = spans.STYLE + talk.STYLE + cards.STYLE
STYLE = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: 0 auto; }
.ag-head h1 { margin: 0; font-size: 1.5rem; font-weight: 650; }
.ag-head p, .ag-nothing, .ag-wait { margin: 0; color: var(--body-text-color-subdued); }
.ag-text { white-space: pre-wrap; overflow-wrap: anywhere; }
.ag-note { margin: 0; color: #b45309; } .dark .ag-note { color: #fbbf24; }
#ag-panel, #ag-panel > *, #ag-head, #ag-head > * { padding: 0 !important; }
#ag-box .submit-button { background: var(--button-primary-background-fill); color: var(--button-primary-text-color); }
#ag-examples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(46%, 200px), 1fr));
  gap: .4rem; }
#ag-examples button { min-width: 0; font-weight: 500; }
.ag-side { border: 1px solid var(--border-color-primary); border-radius: var(--block-radius); padding: .9rem 1rem; }
.ag-side h2 { margin: 0 0 .7rem; font-size: 1.05rem; font-weight: 600; color: var(--body-text-color); }
"""
