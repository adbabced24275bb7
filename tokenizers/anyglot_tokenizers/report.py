"""The report of an evaluation: `report.json`, `report.md` and `index.html` beside their media. No server, no network.

Takes the dictionary that `evaluate` gives; knows no tokenizers. Both pages are made from the same tables.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.media import write_audio, write_image
from anyglot_tokenizers.metrics import slaney_filters

MEDIA = "media"
NAMES = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS, even weights",
    "frechet": "Fréchet distance",
    "snr": "SNR",
    "si_sdr": "SI-SDR",
    "mel": "mel distance, 7 scales",
    "mel_audiotools": "mel distance, 2 scales",
    "pesq_wb": "PESQ wide band",
    "pesq_nb": "PESQ narrow band",
    "stoi": "STOI",
    "visqol": "ViSQOL",
    "f0_correlation": "F0 correlation",
    "wer": "word error rate",
    "speaker_similarity": "speaker similarity",
}
GLOW = ((0, (8, 8, 24)), (0.35, (70, 20, 110)), (0.6, (190, 50, 90)), (0.8, (250, 140, 60)), (1, (255, 240, 190)))
INK = ("#3b6fd4", "#d4653b", "#2f9e6b", "#9a55c9", "#b98f12", "#1d97a8", "#c9447b", "#6d7682")

STYLE = """
:root { color-scheme: light dark; --line: #8883; --soft: #8881; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: .2rem; } h2 { margin: 2.5rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
.soft { opacity: .7; } .facts { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0; }
.fact { background: var(--soft); border-radius: .5rem; padding: .5rem .9rem; }
.fact b { display: block; font-size: 1.35rem; line-height: 1.3; } .fact span { font-size: .8rem; opacity: .7; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-size: .8rem; opacity: .7; font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th, td { white-space: nowrap; } th.text { text-align: left; }
td.text { text-align: left; white-space: normal; font-size: .85rem; opacity: .75; min-width: 14rem; }
svg { width: 100%; max-width: 40rem; height: auto; display: block; margin-top: 1rem; }
svg text { font-size: 11px; fill: currentColor; opacity: .7; } svg .axis { stroke: currentColor; opacity: .25; }
.sample { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; margin: .8rem 0; }
.sample h3 { margin: 0 0 .5rem; font-size: .9rem; overflow-wrap: anywhere; }
.sample p { margin: .5rem 0 0; font-size: .85rem; opacity: .75; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem; }
.pair h4 { margin: 0 0 .3rem; font-size: .75rem; font-weight: 600; opacity: .6; }
.pair img { display: block; width: 100%; border-radius: 4px; } .pair img.wave { height: 7rem; object-fit: fill; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: .8rem; }
.pictures .sample { margin: 0; } .pictures .pair { grid-template-columns: 1fr 1fr; }
.pair img.picture { image-rendering: pixelated; }
audio { width: 100%; height: 2.2rem; margin-top: .4rem; }
"""


@dataclass
class Section:
    """A heading, a sentence, and a table whose last columns may be text."""

    title: str
    text: str = ""
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    texts: int = 0  # so many columns at the end are sentences


def write_report(result: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    """Write `report.json`, `report.md` and `index.html`; the media of `result["samples"]` are there already."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("report.json", json.dumps(result, indent=1) + "\n"),
        ("report.md", markdown(result)),
        ("index.html", page(result)),
    ):
        with atomic_write(place / name) as path:
            path.write_text(content, encoding="utf-8")


def write_sample(
    folder: str | os.PathLike[str], index: int, original: Tensor, output: Tensor, sample_rate: int | None
) -> dict[str, Any]:
    """Write one pair of media below `folder`, with a picture of each sound; returns their paths from there."""
    (Path(folder) / MEDIA).mkdir(parents=True, exist_ok=True)
    paths: dict[str, Any] = {}
    for role, medium in (("original", original), ("reconstruction", output)):
        stem = f"{MEDIA}/{index:02d}-{role}"
        paths[role] = {}
        if medium.ndim == 3:
            write_image(Path(folder) / f"{stem}.png", medium)
            paths[role]["picture"] = f"{stem}.png"
            continue
        if sample_rate is not None:
            write_audio(Path(folder) / f"{stem}.wav", medium[:8], sample_rate)
            paths[role]["audio"] = f"{stem}.wav"
            picture = spectrogram(medium, sample_rate)
        else:
            picture = curve(medium[0], float(original[0].min()), float(original[0].max()))
        write_image(Path(folder) / f"{stem}.png", picture)
        paths[role]["wave"] = f"{stem}.png"
    return paths


def spectrogram(audio_CS: Tensor, sample_rate: int, height: int = 96, width: int = 600) -> Tensor:
    """Picture of a sound's log-mel spectrogram, float `[3, height, width]`: -80 dB to 0 dB, low notes at the bottom."""
    samples = audio_CS.float().mean(0)
    n_fft = 1024
    samples = torch.nn.functional.pad(samples, (0, max(n_fft - len(samples), 0)))
    spectrum = torch.stft(
        samples, n_fft, max(len(samples) // width, 1), window=torch.hann_window(n_fft), return_complex=True
    )
    filters_FM = slaney_filters(n_fft, 64, sample_rate)  # more would leave some without a bin
    mel_MT = (filters_FM / filters_FM.sum(0).clamp(min=1e-12)).T @ spectrum.abs().square()
    level_MT = ((mel_MT.clamp(min=1e-12) / (n_fft / 4) ** 2).log10() * 10 / 80 + 1).clamp(0, 1)
    level_MT = torch.nn.functional.interpolate(level_MT[None, None], (height, width), mode="bilinear")[0, 0].flip(0)
    stops, colors = [at for at, _ in GLOW], np.array([color for _, color in GLOW]) / 255
    channels = [np.interp(level_MT.numpy(), stops, colors[:, channel]) for channel in range(3)]
    return torch.from_numpy(np.stack(channels)).float()


def curve(series_S: Tensor, low: float, high: float, height: int = 96, width: int = 600) -> Tensor:
    """Picture of a series between `low` and `high`, float `[3, height, width]`."""
    picture = torch.ones(3, height, width)
    pieces = np.array_split(series_S.numpy(), min(width, len(series_S)))
    for column in range(width):
        piece = pieces[column * len(pieces) // width]
        share = (np.array([piece.max(), piece.min()]) - low) / max(high - low, 1e-12)
        top, bottom = ((1 - share) * (height - 1)).clip(0, height - 1).round().astype(int)
        picture[:, top : bottom + 1, column] = torch.tensor([0.23, 0.44, 0.83])[:, None]
    return picture


# The tables, shared by both pages


def sections(result: dict[str, Any]) -> list[Section]:
    """All tables of the report."""
    spec, cost, speed = result["tokenizer"]["spec"], result["cost"], result["speed"]
    found = []
    metrics = [
        [
            f"{NAMES.get(name, name)} {'↑' if row['better'] == 'higher' else '↓'}",
            f"{number(row['mean'])}{' ' + row['unit'] if row['unit'] and row['mean'] is not None else ''}",
            f"{number(row['low'])} to {number(row['high'])}" if row["low"] is not None else "–",
            str(row["n"]),
            str(row["skipped"]) if row["skipped"] else "–",
            "; ".join([row["note"]] * bool(row["n"] and row["note"]) + _reasons(row)),
        ]
        for name, row in result["metrics"].items()
    ]
    text = (
        "Means over items with their 95 % bootstrap interval; ↑ higher is better, ↓ lower is better. What could not be "
        "measured is skipped and counted."
    )
    if not spec["decodes"]:
        text = "This tokenizer only encodes, so there is nothing to compare."
    found.append(
        Section("Reconstruction", text, ["measure", "mean", "interval", "n", "skipped", "remarks"], metrics, texts=1)
    )
    codes = [
        [
            str(index + 1),
            f"{row['codebook_size']:,}",
            f"{row['usage']:.1%}",
            number(row["perplexity"]),
            f"{row['normalised_entropy']:.3f}",
            f"{math.log2(row['codebook_size']):.2f}",
            f"{row['entropy']:.2f}",
        ]
        for index, row in enumerate(result["codes"])
    ]
    positions = result["codes"][0]["positions"]
    text = f"Counted over all {positions:,} positions of the set, not per batch."
    if positions < 20 * max(row["codebook_size"] for row in result["codes"]):
        text += " That is under 20 per entry: usage and entropy read too low for want of data."
    head = ["codebook", "entries", "used", "perplexity", "entropy / maximum", "bits stored", "bits entropy-coded"]
    found.append(Section("Codes", text, head, codes))
    found.append(Section("Cost", "", ["what", "value"], [[name, value] for name, value in _costs(cost)]))
    misses = [
        [way, f"{row['rate']:.2%}", f"{row['changed']:,} of {row['codes']:,}", ""]
        if "rate" in row
        else [way, "–", "–", row["skipped"]]
        for way, row in result["misses"].items()
    ]
    found.append(
        Section(
            "Miss rate",
            "Share of codes that change against each item encoded alone in float32.",
            ["encoded", "changed", "codes", "remarks"],
            misses,
            texts=1,
        )
    )
    settings = result["settings"]
    rows = [
        [
            kind,
            f"{number(speed[f'{kind}_tokens_per_second'])}",
            *([_real_time(speed[f"{kind}_real_time_factor"])] if f"{kind}_real_time_factor" in speed else []),
            f"{speed[f'{kind}_peak_mib']:.0f} MiB",
        ]
        for kind in ("encode", "decode")
        if f"{kind}_seconds" in speed
    ]
    found.append(
        Section(
            "Speed",
            f"Items one at a time on {settings['device']}, {settings['threads']} threads, torch {settings['torch']}; "
            "memory is the growth while working.",
            ["work", "tokens/s", *(["real-time factor"] if spec["sample_rate"] else []), "peak memory"],
            rows,
        )
    )
    if result["probe"] is not None:
        found.append(_probe_section(result["probe"]))
    if result["failures"]:
        found.append(
            Section(
                "Failures",
                f"{len(result['failures'])} items could not be read or were refused; they count nowhere above.",
                ["item", "reason"],
                [[failure["item"], failure["reason"]] for failure in result["failures"]],
                texts=1,
            )
        )
    return found


def _reasons(row: dict[str, Any]) -> list[str]:
    return [f"{count} × {reason}" for reason, count in row["reasons"].items()]


def _probe_section(probe: dict[str, Any]) -> Section:
    rows = [
        [
            name,
            f"{row['accuracy']:.1%}",
            f"{row['low']:.1%} to {row['high']:.1%}",
            f"{row['chance']:.1%}",
            str(row["classes"]),
            f"{row['n']:,}",
            str(row["groups"]),
        ]
        for name, row in probe["rows"].items()
    ]
    skipped = f" Skipped: {'; '.join(_reasons(probe))}." if probe["skipped"] else ""
    return Section(
        "Semantic probe",
        f"Accuracy of a linear classifier on histograms of codes, on groups it never saw; classes by the pattern "
        f"{probe['labels']}.{skipped}",
        ["probe on", "accuracy", "interval", "chance", "classes", "items", "groups"],
        rows,
    )


def _costs(cost: dict[str, Any]) -> list[tuple[str, str]]:
    found = [("tokens per item", number(cost["tokens_per_item"]))]
    if "bitrate" in cost:
        return [
            *found,
            ("tokens per second of sound", number(cost["tokens_per_second"])),
            ("bitrate, stored", f"{cost['bitrate'] / 1000:.2f} kbit/s"),
            ("bitrate, entropy-coded", f"{cost['entropy_coded_bitrate'] / 1000:.2f} kbit/s"),
        ]
    unit = "pixel" if "bits_per_pixel" in cost else "sample"
    return [
        *found,
        (f"bits per {unit}, stored", number(cost[f"bits_per_{unit}"])),
        (f"bits per {unit}, entropy-coded", number(cost[f"entropy_coded_bits_per_{unit}"])),
    ]


def number(value: float | None) -> str:
    """Three or four figures that mean something; a dash for None."""
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def _real_time(factor: float) -> str:
    return f"{factor:.4f} ({1 / factor:,.0f} × real time)"


def _title(result: dict[str, Any]) -> tuple[str, str]:
    tokenizer, settings = result["tokenizer"], result["settings"]
    spec = tokenizer["spec"]
    rate = f" at {spec['sample_rate']:,} Hz" if spec["sample_rate"] else ""
    line = (
        f"{settings['items']} of {settings['of']} items, {settings['num_quantizers']} of {len(spec['codebook_sizes'])} "
        f"codebooks; {number(tokenizer['parameters'] / 1e6)} million parameters; licence of the weights "
        f"{spec['license'] or 'unknown'}; fingerprint {spec['fingerprint'][:12]}"
    )
    return f"{tokenizer['class']}: {spec['modality']}{rate}", line


# Pages


def markdown(result: dict[str, Any]) -> str:
    """The report as Markdown, with links to the samples."""

    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")

    title, line = _title(result)
    parts = [f"# {title}", f"{line}."]
    for section in sections(result):
        parts.append(f"## {section.title}")
        parts += [cell(section.text)] if section.text else []
        if section.rows:
            rule = ["---", *["---:"] * (len(section.head) - 1 - section.texts), *["---"] * section.texts]
            lines = [section.head, rule, *([cell(text) for text in row] for row in section.rows)]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in lines))
    if result["samples"]:
        parts.append("## Samples")
    for sample in result["samples"]:
        parts.append(f"### {cell(sample['item'])}")
        for role in ("original", "reconstruction"):
            files = sample[role]
            picture = f"![{role}]({files.get('picture') or files.get('wave')})"
            parts.append(f"[{role}]({files['audio']}) {picture}" if "audio" in files else f"{role} {picture}")
        parts.append(cell(_scores(sample["scores"])))
    return "\n\n".join(parts) + "\n"


def _scores(scores: dict[str, float]) -> str:
    return ", ".join(f"{NAMES.get(name, name)} {number(score)}" for name, score in scores.items())


def page(result: dict[str, Any]) -> str:
    """The report as one HTML page, with players; the media lie beside it."""
    title, line = _title(result)
    body = []
    for section in sections(result):
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        body += [f"<p class='soft'>{html.escape(section.text)}</p>"] if section.text else []
        body += [_table(section)] if section.rows else []
        body += [_ranks(result["codes"])] if section.title == "Codes" else []
    if result["samples"]:
        body.insert(_place_of(body, "Codes"), _samples(result["samples"]))
    facts = "".join(
        f"<div class='fact'><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"
        for name, value in _facts(result)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1><p class="soft">{html.escape(line)}</p>
<div class="facts">{facts}</div>
{"".join(body)}
</body></html>
"""


def _place_of(body: Sequence[str], title: str) -> int:
    return next(place for place, part in enumerate(body) if part == f"<h2>{title}</h2>")


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The handful of numbers to see first."""
    facts = []
    for name in ("psnr", "ssim", "stoi", "pesq_wb", "visqol", "mel", "snr"):
        row = result["metrics"].get(name)
        if row is not None and row["mean"] is not None:
            facts.append((NAMES[name], f"{number(row['mean'])}{' ' + row['unit'] if row['unit'] == 'dB' else ''}"))
    facts += [(name, value) for name, value in _costs(result["cost"]) if name.endswith("stored")]
    facts.append(("codes used, least", f"{min(row['usage'] for row in result['codes']):.0%}"))
    if "encode_real_time_factor" in result["speed"]:
        factors = [result["speed"].get(f"{kind}_real_time_factor", 0) for kind in ("encode", "decode")]
        facts.append(("times real time", f"{1 / sum(factors):,.0f}"))
    return facts


def _table(section: Section) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        first_text = len(cells) - section.texts
        return "".join(
            f"<{tag}{' class=text' if place >= first_text else ''}>{html.escape(cell)}</{tag}>"
            for place, cell in enumerate(cells)
        )

    rows = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in section.rows)
    return f"<div class='wide'><table><tr>{row(section.head, 'th')}</tr>{rows}</table></div>"


def _ranks(codes: Sequence[dict[str, Any]]) -> str:
    """Share of each code against its rank, both logarithmic, a line per codebook; the dashed line is even use."""
    left, right, top, bottom = 46, 590, 12, 200
    most = max(row["codebook_size"] for row in codes)
    shares = [share for row in codes for _, share in row["ranked"]]
    if not shares or most < 2:
        return ""
    high, low = math.ceil(math.log10(max(shares))), math.floor(math.log10(min([*shares, 1 / most])))
    high = max(high, low + 1)

    def point(rank: float, share: float) -> str:
        across = left + (right - left) * math.log(rank) / math.log(most)
        down = top + (bottom - top) * (high - math.log10(share)) / (high - low)
        return f"{across:.1f},{down:.1f}"

    parts = []
    for power in range(low, high + 1):
        down = top + (bottom - top) * (high - power) / (high - low)
        label = f"{10.0**power:.{max(-power - 2, 0)}%}"
        parts.append(f"<line class='axis' x1='{left}' x2='{right}' y1='{down:.1f}' y2='{down:.1f}'/>")
        parts.append(f"<text x='{left - 6}' y='{down + 4:.1f}' text-anchor='end'>{label}</text>")
    for power in range(int(math.log10(most)) + 1):
        across = point(10**power, 10.0**high).split(",")[0]
        anchor = "end" if float(across) > right - 20 else "middle"
        parts.append(f"<text x='{across}' y='{bottom + 16}' text-anchor='{anchor}'>{10**power:,}</text>")
    parts.append(f"<text x='{right}' y='{bottom + 30}' text-anchor='end'>rank of the code; dashed: even use</text>")
    even = f"{point(1, 1 / most)} {point(most, 1 / most)}"
    parts.append(f"<polyline points='{even}' fill='none' stroke='currentColor' opacity='.4' stroke-dasharray='4 4'/>")
    for index, row in enumerate(codes):
        color = INK[index % len(INK)]
        line = " ".join(point(rank, share) for rank, share in row["ranked"])
        parts.append(f"<polyline points='{line}' fill='none' stroke='{color}' stroke-width='1.6'/>")
        if index < len(INK):
            key = left + 8 + 62 * index
            parts.append(f"<rect x='{key}' y='{bottom + 23}' width='14' height='4' fill='{color}'/>")
            parts.append(f"<text x='{key + 18}' y='{bottom + 30}'>book {index + 1}</text>")
    label = "Share of positions that each code takes, by rank"
    return f"<svg viewBox='0 0 600 236' role='img' aria-label='{label}'>{''.join(parts)}</svg>"


def _samples(samples: Sequence[dict[str, Any]]) -> str:
    kind = "pictures" if "picture" in samples[0]["original"] else "sounds"
    parts = [f"<h2>Samples</h2><div class='{kind}'>"]
    for sample in samples:
        pair = []
        for role in ("original", "reconstruction"):
            files = sample[role]
            image = "picture" if "picture" in files else "wave"
            player = f"<audio controls preload='none' src='{files['audio']}'></audio>" if "audio" in files else ""
            pair.append(f"<div><h4>{role}</h4><img class='{image}' src='{files[image]}' alt='{role}'>{player}</div>")
        parts.append(
            f"<div class='sample'><h3>{html.escape(sample['item'])}</h3><div class='pair'>{''.join(pair)}</div>"
            f"<p>{html.escape(_scores(sample['scores']))}</p></div>"
        )
    return "".join([*parts, "</div>"])
