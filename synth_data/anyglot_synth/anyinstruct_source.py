"""`AnyInstructSource`: the AnyInstruct recipe as a source of a pipeline, so that one YAML goes from topics to files.

What the model wrote is kept in a folder of its own, so a job that goes on does not ask again. A topic that came to
nothing is a `BadRow`; answers that were refused on the way to a chat are counted in that chat's `meta["refused"]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from anyglot_synth.anyinstruct import AnyInstruct, Reject, Scenario, Topic
from anyglot_synth.dialogue import Dialogue, Json
from anyglot_synth.llm import CachedWriter, Writer, build_writer
from anyglot_synth.sources.base import BadRow, Source
from anyglot_synth.store import Store


class AnyInstructSource(Source):
    """See the module.

    Args:
        writer: a writer or its recipe, such as `{engine: openai, model: qwen, base_url: "http://127.0.0.1:8000/v1"}`.
        answers: folder where the model's answers are kept.
        num_topics, chat, tries, temperature, speech, seed, licence: see `AnyInstruct`.
    """

    name = "anyinstruct"

    def __init__(
        self,
        writer: Writer | Mapping[str, Any] | str,
        answers: str,
        *,
        num_topics: int = 100,
        chat: str = "free",
        tries: int = 3,
        temperature: float = 0.8,
        speech: float = 0.5,
        seed: int = 0,
        licence: str | None = None,
    ) -> None:
        self.recipe = AnyInstruct(
            CachedWriter(writer if isinstance(writer, Writer) else build_writer(writer), answers),
            seed=seed,
            num_topics=num_topics,
            chat=chat,
            tries=tries,
            temperature=temperature,
            speech=speech,
            licence=licence,
        )

    def config(self) -> Json:
        """That of the recipe, the writer's identity included."""
        return self.recipe.config()

    def read(self, store: Store) -> Iterator[Dialogue | BadRow]:
        """Chats as they are written."""
        lost: list[BadRow] = []

        def only(found: Any, kind: type) -> Iterator[Any]:
            for one in found:
                if isinstance(one, kind):
                    yield one
                elif isinstance(one, Reject) and one.final and one.step != "topics":
                    lost.append(BadRow(self.name, 0, f"{one.of[:80]!r}: {one.step}: {one.reason} ({one.detail})"))

        chats = self.recipe.chats(only(self.recipe.scenarios(only(self.recipe.topics(), Topic)), Scenario))
        for dialogue in only(chats, Dialogue):
            yield from lost
            lost.clear()
            yield dialogue
        yield from lost
