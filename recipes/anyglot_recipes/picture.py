"""`python -m anyglot_recipes.picture`: takes the README's picture anew, when the shipped model or the page has changed.

It shows the page of `anyglot serve` after somebody drew and somebody spoke: a drawing on the board, and the answer to
the first spoken example, whatever it is. Needs playwright (extra `dev`), chromium and a speech engine; `make picture`
sees to them.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from anyglot_recipes.shipped import NANO
from anyglot_tokenizers.errors import AnyglotError
from anyglot_tokenizers.files import atomic_write

COLORS = 192
"""Of the picture, so that it stays small."""
WAIT = 120_000
"""Milliseconds for an answer."""
DRAWN = (("large square", "blue", "top left"), ("small cross", "yellow", "middle right"))
HIDDEN = "#ag-cards select { visibility: hidden }"
"""Microphones of the machine that takes the picture."""


def take(path: Path, model: str) -> None:
    """Writes a picture of the page of `model` to `path`. Raises AnyglotError: the server did not start."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, _server(model) as url:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(url, timeout=WAIT)
        page.add_style_tag(content=HIDDEN)
        for drawn in DRAWN:
            for kind, name in zip(("stamp", "color", "place"), drawn, strict=True):
                page.locator(f"[data-{kind}='{name}']").click(timeout=WAIT)
        page.locator("#ag-cards button", has_text="“").first.click()
        for medium in ("img.ag-picture", "audio"):
            page.wait_for_selector(f"#ag-chat .bot {medium}", timeout=WAIT)
        page.wait_for_selector("#ag-stop[disabled]", timeout=WAIT)
        page.evaluate("scrollTo(0, 0)")
        content = page.screenshot()
        browser.close()
    picture = Image.open(io.BytesIO(content)).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


@contextmanager
def _server(model: str) -> Iterator[str]:
    """The address of a server of the model."""
    command: list[Any] = [sys.executable, "-m", "anyglot_recipes.cli", "serve", "--model", model, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            found = (re.search(r"a page to talk to it on (http\S+)", line) for line in server.stderr)
            address = next((match[1] for match in found if match), None)
            if address is None:
                raise AnyglotError("the server did not start; see: anyglot serve")
            yield address
        finally:
            server.terminate()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(prog="python -m anyglot_recipes.picture", description="Takes the README's picture")
    parser.add_argument("--out", type=Path, default=Path("docs/page.png"), help="default docs/page.png")
    parser.add_argument("--model", default=str(NANO), help="default: nano")
    given = parser.parse_args(arguments)
    try:
        take(given.out, given.model)
    except AnyglotError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{given.out}: {given.out.stat().st_size // 1024} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
