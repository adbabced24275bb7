"""`anyglot serve`: an HTTP server with OpenAI's shapes over a unified model.

Parses arguments, loads the model, listens; the server itself is `anyglot_lm.serve`. Beside it stands a web page, where
gradio is installed. Stops on SIGINT and SIGTERM, after the answers in flight.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from anyglot_lm.serve.limits import Limits
from anyglot_tokenizers.errors import AnyglotError

KEY_VARIABLE = "ANYGLOT_API_KEY"
LOCAL = ("127.0.0.1", "::1", "localhost")


def add_parser(commands: Any, default_model: str) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser("serve", help="an HTTP server with OpenAI's API over a model")
    parser.add_argument("--model", default=default_model, metavar="DIR", help="default: the shipped model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    parser.add_argument("--name", help="what clients call the model (default: the folder's name)")
    parser.add_argument("--no_page", action="store_true", help="serve no web page, only the API")
    parser.add_argument(
        "--allow_host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that browsers may call this server by, beside localhost and addresses; may be repeated",
    )
    parser.add_argument("--api_key", metavar="KEY", help=f"clients must send it; better: the variable {KEY_VARIABLE}")
    parser.add_argument("--temperature", type=float, default=0.0, help="of requests that name none (default 0)")
    parser.add_argument("--device", default="cpu", help="of model and tokenizers (default cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the language model")
    bounds = parser.add_argument_group("limits")
    for entry in fields(Limits):
        assert isinstance(entry.default, int | float)
        bounds.add_argument(
            f"--{entry.name}",
            type=type(entry.default),
            default=entry.default,
            metavar="N",
            help=f"{entry.metadata['help']} (default {entry.default})",
        )
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    import importlib.util
    import logging
    import signal

    import torch
    from transformers.utils import logging as transformers_logging

    from anyglot_lm.serve.app import build_app
    from anyglot_lm.serve.connection import listen, make_server
    from anyglot_lm.unified import UnifiedModel
    from anyglot_recipes.device import device_of
    from anyglot_recipes.serve_examples import cards, examples

    limits = Limits(**{entry.name: getattr(arguments, entry.name) for entry in fields(Limits)})
    key = arguments.api_key if arguments.api_key is not None else os.environ.get(KEY_VARIABLE)
    if key is not None and not (key and key.isascii() and key.isprintable()):
        raise AnyglotError(f"the API key (--api_key or {KEY_VARIABLE}) is empty or not plain ASCII; choose another")
    if not 0 <= arguments.temperature <= 2:
        raise AnyglotError(f"--temperature is {arguments.temperature}; give 0 to 2")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    transformers_logging.disable_progress_bar()
    socket = listen(arguments.host, arguments.port)  # before the model: a port that is taken shows at once
    dtype = getattr(torch, arguments.dtype)
    model = UnifiedModel.from_pretrained(arguments.model, dtype=dtype, device=device_of(arguments.device))
    name = arguments.name or Path(arguments.model).resolve().name
    page = not arguments.no_page and importlib.util.find_spec("gradio") is not None
    app = build_app(
        model,
        name=name,
        limits=limits,
        key=key,
        temperature=arguments.temperature,
        hosts=arguments.allow_host,
        examples=examples(model) if page else None,
        cards=cards(model) if page else (),
    )
    host, port = socket.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if page:
        print(f"anyglot: a page to talk to it on http://{shown}:{port}/", file=sys.stderr)
    elif not arguments.no_page:
        print("anyglot: no page to talk to it; pip install 'anyglot[web]' brings it", file=sys.stderr)
    print(f"anyglot: {name} on http://{shown}:{port}/v1", file=sys.stderr, flush=True)
    if key is None and arguments.host not in LOCAL:
        print(f"anyglot: anyone who reaches {arguments.host} may use it; set {KEY_VARIABLE}", file=sys.stderr)
    for sign in (signal.SIGINT, signal.SIGTERM):  # uvicorn stops on them, and repeats them when it has
        signal.signal(sign, lambda *_: None)
    make_server(app, limits).run(sockets=[socket])
    print("anyglot: stopped", file=sys.stderr)
    return 0
