"""`anyglot demo`: every direction with the shipped model, as one page that plays, and `report.json`.

Runs the nanoworld benchmark on held-out scenes and shows a few samples of every task with the checker's verdict beside
each. The page is plain HTML beside its media files: no server, no network.
"""

from __future__ import annotations

import html
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.evaluate import Checkers, Graded, evaluate, truth
from anyglot_recipes.nano import test_items
from anyglot_recipes.tasks import TASKS, prompt, right_words
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
img.picture { width: 128px; height: 128px; image-rendering: pixelated; border-radius: 4px; }
img.spectrogram { display: block; width: 100%; max-width: 20rem; height: 64px; border-radius: 4px; }
audio { width: 100%; max-width: 20rem; height: 2.2rem; }
.good { color: #1a7f37; } .bad { color: #cf222e; } .part { color: #9a6700; }
"""


def demo(
    model_dir: str | Path,
    out: str | Path,
    *,
    num: int = 50,
    shown: int = 4,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write `out/index.html` and `out/report.json`; returns the report.

    Args:
        model_dir: folder of a unified model.
        out: folder of the page, made when needed.
        num: held-out samples per task.
        shown: samples per task on the page.
        progress: called with one line per finished task.
    """
    started = time.perf_counter()
    folder = Path(out)
    (folder / "media").mkdir(parents=True, exist_ok=True)
    model = UnifiedModel.from_pretrained(model_dir)
    items = test_items(model, num)
    galleries: dict[str, list[Graded]] = {}

    def keep(graded: list[Graded]) -> None:
        galleries[graded[0].task] = graded[:shown]

    report = evaluate(model, items, checkers=Checkers(), keep=keep, progress=progress)
    sections = [_section(model, folder, task, galleries[task], report) for task in TASKS]
    report["seconds"] = round(time.perf_counter() - started, 1)
    with atomic_write(folder / "index.html") as path:
        path.write_text(_page(report, sections), encoding="utf-8")
    with atomic_write(folder / "report.json") as path:
        path.write_text(json.dumps(report, indent=1))
    return report


def _page(report: dict[str, Any], sections: list[str]) -> str:
    rows = "".join(
        f"<tr><td><a href='#{_anchor(r['task'])}'>{html.escape(r['task'])}</a></td><td>{r['n']}</td>"
        f"<td>{r['score']:.2f}</td><td>{r['chance']:.2f}</td><td>{r['ceiling']:.2f}</td></tr>"
        for r in report["rows"]
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Anyglot demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>Anyglot: any modality in, any modality out</h1>
<p>One small language model reads and writes text, pictures, speech and music of nanoworld. Every scene below holds a
combination of shape, color and size that never occurred in training. Checkers read each answer back without the model.
Mean score over the 12 directions: <b>{report["mean"]}</b>. This page took {report["seconds"]} s.</p>
<table><tr><th>task</th><th>n</th><th>score</th><th>chance</th><th>ceiling</th></tr>{rows}</table>
{"".join(sections)}
</body></html>
"""


def _anchor(task: str) -> str:
    return task.replace("->", "-to-").replace("+", "-and-")


def _section(model: UnifiedModel, folder: Path, task: str, graded: list[Graded], report: dict[str, Any]) -> str:
    row = next(r for r in report["rows"] if r["task"] == task)
    parts = [f"<h2 id='{_anchor(task)}'>{html.escape(task)}</h2><p>score {row['score']:.2f} on {row['n']} scenes</p>"]
    for index, g in enumerate(graded):
        name = f"{_anchor(task)}-{index}"
        given = []
        for position, segment in enumerate(prompt(g.item, task).segments):
            media: Any = segment.content
            if segment.modality != "text":
                media = model.decode_media(segment.modality, [np.asarray(segment.content)])[0]
            note = g.item.question if segment.modality == "speech" and task.startswith("image+") else ""
            given.append(_medium(folder, f"{name}-in{position}", segment.modality, media, model, note))
        answered = [
            _medium(folder, f"{name}-out{position}", output.modality, output.content, model, "")
            for position, output in enumerate(g.outputs)
        ]
        wanted = right_words(g.item, task) or describe(truth(g.item, task), None, "spoken")
        kind = "good" if g.score > 0.999 else "part" if g.score >= 0.5 else "bad"
        heard = "<br>".join(html.escape(h) or "<i>nothing</i>" for h in g.heard)
        parts.append(
            f"<div class='sample'><div><h3>given</h3>{''.join(given)}</div>"
            f"<div><h3>answer</h3>{''.join(answered)}</div>"
            f"<div><h3>verdict</h3><p class='{kind}'><b>{g.score:.2f}</b></p><p>checker read: {heard}</p>"
            f"<p>truth: {html.escape(wanted)}</p></div></div>"
        )
    return "".join(parts)


def _medium(folder: Path, name: str, modality: str, media: Any, model: UnifiedModel, note: str) -> str:
    """HTML of one medium, its file written below `media/`."""
    if modality == "text":
        return f"<p>{html.escape(str(media))}</p>"
    if media is None:
        return "<p><i>nothing</i></p>"
    if modality == "image":
        write_image(folder / "media" / f"{name}.png", media)
        return f"<img class='picture' src='media/{name}.png' alt='picture'>"
    rate = model.tokenizers[modality].spec.sample_rate
    assert rate is not None
    write_audio(folder / "media" / f"{name}.wav", media, rate)
    _spectrogram(folder / "media" / f"{name}-spectrogram.png", media, rate)
    caption = f"<p>“{html.escape(note)}”</p>" if note else ""
    return (
        f"<audio controls preload='none' src='media/{name}.wav'></audio>"
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
