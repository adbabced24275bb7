"""Cards of the page: one input each, a microphone or a drawing board, whose content is answered at once.

What a card asks for and what can be drawn on it is the caller's; this file says what a card is, and draws: stamps in
colors, put on the places of a grid, become a picture of exactly the pixels that its maker's masks give. It knows no
gradio, that is `page.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from anyglot_lm.serve.talk import Example

if TYPE_CHECKING:
    from torch import Tensor

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Sketch:
    """What can be drawn.

    Attributes:
        size: side of the picture in pixels.
        background: its RGB, 0..255.
        colors: RGB of each color, by name.
        stamps: how much a stamp covers of each pixel, rows of 0..1, a square of an even side, by name.
        rows, columns: names and pixel coordinates of the places at which a stamp's centre can be.
        most: stamps in a picture; a further one takes the place of the oldest.
    """

    size: int
    background: Color
    colors: Mapping[str, Color]
    stamps: Mapping[str, Sequence[Sequence[float]]]
    rows: Mapping[str, int]
    columns: Mapping[str, int]
    most: int

    def html(self, action: str) -> str:
        """The board, its tools, and a button that says `action`."""

        def buttons(kind: str, names: Sequence[str]) -> str:
            return "".join(
                f"<button type='button' data-{kind}='{escape(name)}' title='{escape(name)}'></button>" for name in names
            )

        places = [f"{row} {column}" for row in self.rows for column in self.columns]
        return (
            f"<div class='ag-sketch'><div class='ag-board' style='--columns: {len(self.columns)}'>"
            f"<canvas width='{self.size}' height='{self.size}'></canvas>"
            f"<div class='ag-places'>{buttons('place', places)}</div></div>"
            f"<div class='ag-tools'><div class='ag-stamps'>{buttons('stamp', list(self.stamps))}</div>"
            f"<div class='ag-colors'>{buttons('color', list(self.colors))}</div>"
            "<div class='ag-acts'><button type='button' class='ag-clear'>Clear</button>"
            f"<button type='button' class='ag-go' disabled>{escape(action)}</button></div></div></div>"
        )

    def props(self) -> dict[str, Any]:
        """What `SCRIPT` draws with."""
        return {
            "size": self.size,
            "background": self.background,
            "colors": dict(self.colors),
            "stamps": {name: [[round(float(v), 4) for v in row] for row in mask] for name, mask in self.stamps.items()},
            "places": {f"{row} {column}": [x, y] for row, y in self.rows.items() for column, x in self.columns.items()},
            "most": self.most,
        }


@dataclass(frozen=True)
class Card:
    """A task in one step.

    Attributes:
        title, hint: what it does, and a line about how.
        action: what the button below a drawing says.
        modality: of what is recorded or drawn.
        order: modalities of the answer.
        examples: to be tried without recording or drawing anything.
        sketch: what can be drawn; None: it is recorded.
        tidy: makes a recording, float `[C, samples]` at the tokenizer's rate, more like what the model knows.
    """

    title: str
    hint: str
    modality: str
    order: tuple[str, ...]
    action: str = ""
    examples: tuple[Example, ...] = ()
    sketch: Sketch | None = None
    tidy: Callable[[Tensor], Tensor] | None = None


SCRIPT = """
const board = element.querySelector("canvas"), pen = board.getContext("2d"), go = element.querySelector(".ag-go");
const {size, background, colors, stamps, places, most} = props.sketch;
const tools = kind => [...element.querySelectorAll(`[data-${kind}]`)];
let things = [], stamp = Object.keys(stamps)[0], color = Object.keys(colors)[0];

function paint(pen, side, shown) {
  const image = pen.createImageData(side, side), pixels = new Float32Array(side * side * 3);
  for (let i = 0; i < pixels.length; i++) pixels[i] = background[i % 3];
  for (const {stamp, color, at: [x, y]} of shown) {
    const mask = stamps[stamp], left = x - mask.length / 2, top = y - mask.length / 2;
    mask.forEach((row, i) => row.forEach((share, j) => {
      const pixel = (top + i) * side + left + j;
      if (share && top + i >= 0 && top + i < side && left + j >= 0 && left + j < side)
        for (let c = 0; c < 3; c++) pixels[3 * pixel + c] += share * (colors[color][c] - pixels[3 * pixel + c]);
    }));
  }
  for (let i = 0; i < side * side; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = Math.round(pixels[3 * i + c]);
    image.data[4 * i + 3] = 255;
  }
  pen.putImageData(image, 0, 0);
}

function show() {
  paint(pen, size, things);
  go.disabled = !things.length;
  for (const tool of tools("stamp")) {
    const side = stamps[tool.dataset.stamp].length, small = tool.firstChild || document.createElement("canvas");
    small.width = small.height = side;
    paint(small.getContext("2d"), side, [{stamp: tool.dataset.stamp, color, at: [side / 2, side / 2]}]);
    tool.replaceChildren(small);
    tool.ariaPressed = tool.dataset.stamp === stamp;
  }
  for (const tool of tools("color")) {
    tool.style.background = `rgb(${colors[tool.dataset.color]})`;
    tool.ariaPressed = tool.dataset.color === color;
  }
}

function put(place) {
  const old = things.find(thing => thing.place === place);
  things = things.filter(thing => thing !== old);
  if (!old || old.stamp !== stamp || old.color !== color)
    things = [...things, {stamp, color, place, at: places[place]}].slice(-most);
}

element.addEventListener("click", event => {
  const tool = event.target.closest("button");
  if (!tool) return;
  if (tool.dataset.stamp) stamp = tool.dataset.stamp;
  else if (tool.dataset.color) color = tool.dataset.color;
  else if (tool.dataset.place) put(tool.dataset.place);
  else if (tool === go) { props.value = board.toDataURL("image/png"); trigger("submit"); }
  else things = [];
  show();
});
show();
"""
"""For gradio's HTML: `value` becomes the picture as a data: URI when it is to be answered."""
STYLE = """
#ag-cards { align-items: stretch; }
.ag-card { border: 1px solid var(--border-color-primary); border-radius: var(--block-radius); padding: .9rem 1rem;
  gap: .7rem; }
.ag-card h2 { margin: 0 0 .2rem; font-size: 1.05rem; font-weight: 600; }
.ag-card p { margin: 0; font-size: .85rem; color: var(--body-text-color-subdued); }
.ag-card .html-container { padding: 0 !important; }
.ag-card [aria-label=Clear] { display: none; } /* of the recorder, which empties itself */
.ag-sketch { display: flex; flex-wrap: wrap; gap: 1rem; }
.ag-sketch button { border: 0; padding: 0; background: none; cursor: pointer; }
.ag-board { position: relative; width: 192px; height: 192px; }
.ag-board canvas { width: 100%; height: 100%; image-rendering: pixelated; border-radius: 6px; display: block; }
.ag-places { position: absolute; inset: 0; display: grid; grid-template-columns: repeat(var(--columns), 1fr); }
.ag-places button { border-radius: 6px; }
.ag-places button:hover, .ag-places button:focus-visible { box-shadow: inset 0 0 0 1px #fff8; }
.ag-tools { display: flex; flex-direction: column; gap: .6rem; justify-content: space-between; }
.ag-stamps { display: grid; grid-template-columns: repeat(4, 42px); gap: .4rem; }
.ag-stamps button, .ag-stamps canvas { display: block; width: 42px; height: 42px; border-radius: 6px; }
.ag-colors { display: flex; justify-content: space-between; }
.ag-colors button { width: 26px; height: 26px; border-radius: 50%; box-shadow: inset 0 0 0 1px #8884; }
.ag-tools [aria-pressed=true] { outline: 2px solid var(--color-accent); outline-offset: 1px; }
.ag-acts { display: flex; gap: .5rem; }
.ag-sketch .ag-acts button { padding: .35rem .9rem; border-radius: 6px; font-size: .9rem;
  background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color); }
.ag-sketch .ag-acts .ag-go { flex: 1; background: var(--button-primary-background-fill);
  color: var(--button-primary-text-color); }
.ag-sketch .ag-go:disabled { opacity: .5; cursor: default; }
"""
