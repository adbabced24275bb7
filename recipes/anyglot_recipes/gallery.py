"""Pages of graded samples: what was given, what came out, and the checker's verdict, with media that play.

Plain HTML beside its media files: no server, no network. What is shown, and which numbers stand above it, is the
caller's choice.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.benchmark_report import anchor
from anyglot_recipes.evaluate import Graded, truth
from anyglot_recipes.tasks import CHAINED, CHAT, SPOKEN, Item, prompt, right_words
from anyglot_synth.nanoworld.language import describe
from anyglot_tokenizers.audio import mel_filters
from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.media import write_audio, write_image

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8884; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.sample { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 1rem; align-items: start; margin: 1rem 0;
  padding: .8rem; border: 1px solid #8884; border-radius: .5rem; }
.sample h3 { margin: 0 0 .4rem; font-size: .8rem; text-transform: uppercase; opacity: .6; }
.story { margin: 1.5rem 0; } .story h2 { border: 0; margin: 0; }
.story img.picture { width: 160px; height: 160px; }
.sample button { font: inherit; margin-bottom: .6rem; padding: .2rem .9rem; border: 0; border-radius: .4rem;
  background: #4f46e5; color: #fff; cursor: pointer; }
img.picture { width: 128px; height: 128px; image-rendering: pixelated; border-radius: 4px; }
img.spectrogram { display: block; width: 100%; max-width: 20rem; height: 64px; border-radius: 4px; }
audio { width: 100%; max-width: 20rem; height: 2.2rem; }
.good { color: #1a7f37; } .bad { color: #cf222e; } .part { color: #9a6700; }
"""


SCRIPT = """
function play(button) {
  const sounds = [...button.closest(".sample").querySelectorAll("audio")];
  document.querySelectorAll("audio").forEach(sound => { sound.pause(); sound.onended = null; sound.currentTime = 0; });
  const next = () => { const sound = sounds.shift(); if (sound) { sound.onended = next; sound.play(); } };
  next();
}
"""
"""Plays the sounds of a sample one after the other: what was said, then the answer."""


def page(title: str, intro: str, tables: str, sections: Sequence[str], stories: Sequence[str] = ()) -> str:
    """A whole page. `intro` (one paragraph), `tables` and all else are HTML; `stories` stand before the tables."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>
<script>{SCRIPT}</script></head><body>
<h1>{html.escape(title)}</h1>
<p>{intro}</p>
{"".join(f"<div class='story'>{story}</div>" for story in stories)}
{tables}
{"".join(sections)}
</body></html>
"""


def section(
    model: UnifiedModel, folder: Path, name: str, line: str, graded: Sequence[Graded], title: str | None = None
) -> str:
    """HTML of some samples of one task below a title and a line; their media are written into `folder/media`.

    `name` names the media and what links lead to, and is the title unless there is another.
    """
    (folder / "media").mkdir(parents=True, exist_ok=True)
    parts = [f"<h2 id='{anchor(name)}'>{html.escape(title or name)}</h2><p>{html.escape(line)}</p>"]
    for index, g in enumerate(graded):
        file = f"{anchor(name)}-{index}"
        notes, given = _notes(g.item, g.task), []
        for position, segment in enumerate(prompt(g.item, g.task).segments):
            media: Any = segment.content
            if segment.modality != "text":
                kept = model.vocabulary.block(segment.modality).num_quantizers
                codes = np.asarray(segment.content)[:kept] if segment.role == "assistant" else np.asarray(media)
                media = model.decode_media(segment.modality, [codes])[0]
            note = notes.pop(0) if segment.modality == "speech" and notes else ""
            if segment.modality == "text" and segment.role == "assistant":
                given.append(f"<p><i>answer:</i> {html.escape(str(media))}</p>")
            else:
                given.append(medium(folder, f"{file}-in{position}", segment.modality, media, model, note))
        answered = [
            medium(folder, f"{file}-out{position}", output.modality, output.content, model)
            for position, output in enumerate(g.outputs)
        ]
        wanted = right_words(g.item, g.task) or describe(truth(g.item, g.task), None, "spoken")
        heard = "<br>".join(html.escape(h) or "<i>nothing</i>" for h in g.heard)
        said = f"<p>checker read: {heard}</p><p>truth: {html.escape(wanted)}</p>"
        parts.append(sample("".join(given), "".join(answered), g.score, said))
    return "".join(parts)


def sample(given: str, answered: str, score: float, verdict: str) -> str:
    """HTML of one sample in three columns; all but `score` (0 to 1) is HTML."""
    kind = "good" if score > 0.999 else "part" if score >= 0.5 else "bad"
    button = "<button onclick='play(this)'>▶ Play</button>" if "<audio" in given + answered else ""
    return (
        f"<div class='sample'><div><h3>given</h3>{given}</div><div><h3>answer</h3>{answered}</div>"
        f"<div>{button}<h3>verdict</h3><p class='{kind}'><b>{score:.2f}</b></p>{verdict}</div></div>"
    )


def _notes(item: Item, task: str) -> list[str]:
    """The words of the spoken parts of a prompt."""
    if task == CHAT:
        return [item.question, item.answer, item.second_question]
    return [item.question] if task in (SPOKEN, CHAINED) else []


def medium(
    folder: Path, name: str, modality: str, media: Any, model: UnifiedModel, note: str = "", sound: str = ".wav"
) -> str:
    """HTML of one medium, its file written into `folder/media`, which exists; `sound` is the suffix of audio."""
    if modality == "text":
        return f"<p>{html.escape(str(media))}</p>"
    if media is None:
        return "<p><i>nothing</i></p>"
    if modality == "image":
        write_image(folder / "media" / f"{name}.png", media)
        return f"<img class='picture' src='media/{name}.png' alt='picture'>"
    rate = model.tokenizers[modality].spec.sample_rate
    assert rate is not None
    write_audio(folder / "media" / f"{name}{sound}", media, rate)
    _spectrogram(folder / "media" / f"{name}-spectrogram.png", media, rate)
    caption = f"<p>“{html.escape(note)}”</p>" if note else ""
    return (
        f"<audio controls preload='none' src='media/{name}{sound}'></audio>"
        f"<img class='spectrogram' src='media/{name}-spectrogram.png' alt='spectrogram'>{caption}"
    )


def _spectrogram(path: Path, audio: Tensor, sample_rate: int) -> None:
    """Log-mel picture of audio [1, samples], low frequencies at the bottom."""
    n_fft = 512
    window = torch.hann_window(n_fft)
    spectrum = torch.stft(audio.reshape(-1), n_fft, 160, window=window, return_complex=True).abs()
    mel = (mel_filters(n_fft, 64, sample_rate).T @ spectrum).clamp_min(1e-4).log().numpy()
    level = np.clip((mel - mel.max() + 7) / 7, 0, 1)[::-1]
    colors = np.stack([level, level**2, 0.25 + 0.5 * level * (1 - level)], -1)
    with atomic_write(path) as temporary:
        Image.fromarray((colors * 255).astype(np.uint8)).save(temporary, format="PNG")
