"""`anyglot chat`: parses arguments and reads lines of the terminal; the work is in `chat_session.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def add_parser(commands: Any, default_model: str) -> None:
    """Adds `chat` to the `anyglot` command."""
    chat = commands.add_parser("chat", help="talk with a model in the terminal")
    chat.add_argument("--model", default=default_model, metavar="DIR", help="default: the shipped model")
    chat.add_argument("--out", default="chat", metavar="DIR", help="for the transcript and media (default chat)")
    chat.add_argument("--to", default="any", help="what answers consist of, such as text or text,speech (default any)")
    chat.add_argument("--temperature", type=float, default=0.0)
    chat.add_argument("--seed", type=int, default=0)
    chat.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging

    from anyglot_lm.unified import UnifiedModel
    from anyglot_recipes.chat_session import HELP, Session

    logging.disable_progress_bar()
    session = Session(
        UnifiedModel.from_pretrained(arguments.model),
        Path(arguments.out),
        to=arguments.to,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    session.write(f"{HELP}\n")
    session.run(_lines())
    return 0


def _lines() -> Iterable[str]:
    """Lines of the user, with a prompt and editing where there is a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline

    readline.set_history_length(1000)
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
