"""Alpaca's rows: `{"instruction": ..., "input": ..., "output": ...}`: one question, one answer.

What becomes of `input` (a text to work on, which few would read aloud) is said by the user, since the papers that speak
Alpaca do not say: see `Alpaca`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from anyglot_synth.dialogue import ASSISTANT, SYSTEM, TEXT, USER, Dialogue, DialogueError, Part, Turn
from anyglot_synth.sources.base import RowSource, SourceError, text_of
from anyglot_synth.store import Store

INPUTS = ("append", "text", "drop")


@dataclass(kw_only=True)
class Alpaca(RowSource):
    """Rows with instruction, input and output; also prompt/response, question/answer and Dolly's context.

    Args:
        input: of rows with an input: "append" says it after the instruction; "text" shows it beside the instruction,
            which alone is spoken; "drop" leaves such rows out, each as a bad row.

    All others: see `RowSource`.
    """

    name: ClassVar[str] = "alpaca"
    input: str = "append"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input not in INPUTS:
            raise SourceError(f"source alpaca: input is {self.input!r}; use one of: {', '.join(INPUTS)}")

    def options(self) -> dict[str, Any]:
        """See `RowSource`."""
        return {"input": self.input}

    def build(self, row: Mapping[str, Any], store: Store, folder: Path) -> Iterator[Dialogue]:
        """See `RowSource`."""
        instruction = text_of(row, "instruction", "prompt", "question", "query")
        more = text_of(row, "input", "context", needed=False)
        answer = text_of(row, "output", "response", "answer", "completion")
        system = text_of(row, "system", needed=False)
        if more and self.input == "drop":
            raise DialogueError("it has an input, and input is 'drop'")
        asked: tuple[Part, ...] = (Part(TEXT, instruction),)
        if more and self.input == "append":
            asked = (Part(TEXT, f"{instruction}\n\n{more}"),)
        elif more:
            asked += (Part(TEXT, more),)
        turns = [Turn(SYSTEM, (Part(TEXT, system),))] if system else []
        turns += [Turn(USER, asked), Turn(ASSISTANT, (Part(TEXT, answer),))]
        meta = {"written": [[len(turns) - 2, 1]]} if len(asked) > 1 else {}
        yield Dialogue(tuple(turns), self.data_name, language=self.language, meta=meta)
