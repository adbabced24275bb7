"""`write_card`: the dataset card, `README.md` with the header that the Hugging Face Hub reads.

Written from `job.json` and the report alone: what is in it, how it was made, from what, under which licences, what was
left out, and what it is not good for. No dates; the same dataset gives the same card. Texts of others are escaped.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from anyglot_synth.dataset import JOB, read_job, title_of
from anyglot_synth.dialogue import IMAGE, MUSIC, SPEECH, Json
from anyglot_synth.licences import is_open
from anyglot_synth.report import make_report
from anyglot_tokenizers.files import atomic_write

CARD = "README.md"
NATIVE = "jsonl"
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
TASKS = {
    SPEECH: ("automatic-speech-recognition", "text-to-speech"),
    IMAGE: ("text-to-image",),
    MUSIC: ("text-to-audio",),
}
HUB_LICENCES = frozenset(
    (
        "afl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause",
        "bsl-1.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "gpl-2.0",
        "gpl-3.0", "isc", "lgpl-3.0", "mit", "odbl", "odc-by",
        "pddl", "unknown", "unlicense", "zlib",
    )
)  # fmt: skip
"""Names that the Hub knows, from its documentation, beside those of Creative Commons."""
SECRET = re.compile("(?i)key$|token$|secret|password|credential")

LOADING = {
    NATIVE: """One dialogue a line, media beside it; nothing but the standard library is needed:

```python
import json

for line in open("samples.jsonl", encoding="utf-8"):
    dialogue = json.loads(line)
    for turn in dialogue["turns"]:
        for part in turn["parts"]:
            print(turn["role"], part["modality"], part["text"], part.get("media", {}).get("file"))
```

`anyglot prepare FOLDER --model MODEL --out CODES` makes training data of it.""",
    "webdataset": """One sample is its JSON and its media:

```python
import glob, io, json
import soundfile, webdataset

for sample in webdataset.WebDataset(sorted(glob.glob("data-*.tar")), shardshuffle=False):
    for turn in json.loads(sample["json"])["turns"]:
        for part in turn["parts"]:
            if part["modality"] in ("speech", "music") and "media" in part:
                audio, rate = soundfile.read(io.BytesIO(sample[part["media"]["file"]]))
```""",
    "audiofolder": """One row a sound; `dialogue`, `turn` and `part` put dialogues together again:

```python
import datasets

rows = datasets.load_dataset("audiofolder", data_dir=".", split="train")  # needs torchcodec
rows = datasets.load_dataset("json", data_files="metadata.jsonl", split="train")  # without: soundfile reads `file_name`
```""",
    "imagefolder": """One row a picture; `dialogue`, `turn` and `part` put dialogues together again:

```python
import datasets

rows = datasets.load_dataset("imagefolder", data_dir=".", split="train")
```""",
    "parquet": """One row a dialogue; `file` is relative to this folder:

```python
import pyarrow.parquet

for dialogue in pyarrow.parquet.read_table("dialogues.parquet").to_pylist():
    print(dialogue["id"], dialogue["turns"])
```""",
}


def write_card(folder: str | os.PathLike[str], report: Json | None = None) -> Path:
    """Writes `README.md` of a dataset folder; returns its path. Without a report one is made. Raises `DatasetError`."""
    folder = Path(folder)
    content = card(folder, make_report(folder) if report is None else report)
    with atomic_write(folder / CARD) as path:
        path.write_text(content, encoding="utf-8")
    return folder / CARD


def card(folder: Path, report: Json, form: str = NATIVE) -> str:
    """The text of a card.

    Args:
        folder: whose `job.json` is read.
        report: of the dataset.
        form: in which the data lie beside the card: "jsonl" or one of `export`.
    """
    job = read_job(folder)
    title = title_of(job)
    sections = [
        _header(report, title, form),
        f"# {_plain(title)}\n\n{_summary(report)}",
        f"## How it was made\n\n{_how(job, form)}",
        f"## Sources and licences\n\n{_licences(report)}",
        f"## Engines and voices\n\n{_engines(report)}",
        f"## What was left out\n\n{_left_out(report)}",
        f"## Limits\n\n{_limits(report)}",
        f"## Loading\n\n{LOADING[form]}",
    ]
    return "\n\n".join(sections) + "\n"


def _header(report: Json, title: str, form: str) -> str:
    number = report["counts"]["ok"]
    tasks = ["any-to-any", *(task for modality in report["media"] for task in TASKS.get(modality, ()))]
    lines = ["---", f"pretty_name: {json.dumps(title, ensure_ascii=False)}"]
    lines += _yaml("license", [_hub_licence(name) for name in report["licences"]] or ["unknown"])
    lines += _yaml("language", report["languages"])
    lines += _yaml("size_categories", [next((size for most, size in SIZES if number < most), "n>1M")])
    lines += _yaml("task_categories", tasks)
    lines += _yaml("tags", ["anyglot", "synthetic", *report["media"]])
    if form in (NATIVE, "parquet"):
        file = "samples.jsonl" if form == NATIVE else "dialogues.parquet"
        lines += ["configs:", "- config_name: default", f"  data_files: {file}"]
    return "\n".join([*lines, "---"])


def _yaml(key: str, values: Iterable[str]) -> list[str]:
    unique = dict.fromkeys(values)
    return [f"{key}:", *(f"- {json.dumps(value, ensure_ascii=False)}" for value in unique)] if unique else []


def _hub_licence(name: str) -> str:
    """As the Hub spells it: SPDX names in lower case; what it does not know is "other"."""
    name = {"odbl-1.0": "odbl", "odc-by-1.0": "odc-by", "pddl-1.0": "pddl"}.get(name.lower(), name.lower())
    return name if name in HUB_LICENCES or re.fullmatch(r"cc-by(-nc)?(-sa|-nd)?-[234]\.[05]", name) else "other"


def _summary(report: Json) -> str:
    media = report["media"]
    held = []
    for modality in (SPEECH, MUSIC):
        if modality in media:
            one = media[modality]
            held.append(f"{one['files']:,} clips of {modality} ({one.get('hours', 0):.2f} hours)")
    if IMAGE in media:
        held.append(f"{media[IMAGE]['files']:,} pictures")
    tasks = ", ".join(f"{_plain(task)} ({count:,})" for task, count in report["tasks"].items())
    turns = report["turns"]
    mean = f" of {turns['mean']:.1f} turns on average" if turns["n"] else ""
    return (
        f"{report['counts']['ok']:,} dialogues{mean} with {', '.join(held) or 'text only'}, made by programs with "
        f"Anyglot. Tasks: {tasks or 'none'}."
    )


def _how(job: Json, form: str) -> str:
    facts = {key: job[key] for key in ("seed", "num", "fingerprint") if job.get(key) is not None}
    named = ", ".join(f"{key} `{_code(str(value))}`" for key, value in facts.items())
    recipe = json.dumps(_without_secrets(job.get("recipe")), indent=2, ensure_ascii=False, sort_keys=True)
    lists = f" Every item is in one of the lists beside `{JOB}`: kept, rejected or failed." if form == NATIVE else ""
    return (
        f"By the recipe below ({named or 'no seed noted'}). The same recipe, seed and engines make the same dataset, "
        f"as far as the engines repeat themselves.{lists}\n\n```json\n{recipe}\n```"
    )


def _licences(report: Json) -> str:
    rows = [(s["source"], s["licence"], f"{s['dialogues']:,} dialogues") for s in report["sources"]]
    rows += [
        (f"{modality} by {e['engine']}", e["licence"], f"{e['files']:,} files")
        for modality, one in report["media"].items()
        for e in one["engines"]
    ]
    table = _table(("source", "licence", "amount"), rows)
    closed = sorted({licence for _, licence, _ in rows if not is_open(licence)})
    if closed:
        names = ", ".join(f"`{_code(name)}`" for name in closed)
        table += f"\n\n**Not free to pass on as it is:** {names}. Read these terms before you publish or sell anything."
    return table + "\n\nLicences are those that the recipe and the engines state; nobody has checked them."


def _engines(report: Json) -> str:
    rows = [
        (modality, e["engine"], f"{e['files']:,}") for modality, one in report["media"].items() for e in one["engines"]
    ]
    if not rows:
        return "None: this dataset is text."
    text = _table(("modality", "engine", "files"), rows)
    voices = report["media"].get(SPEECH, {}).get("voices", {})
    if voices:
        text += "\n\n" + _table(
            ("voice", "clips", "hours"), [(v, f"{n['files']:,}", f"{n['hours']:.3f}") for v, n in voices.items()]
        )
    return text


def _left_out(report: Json) -> str:
    rows = [
        (status, stage or "source", reason, f"{count:,}")
        for status, stages in report["ended"].items()
        for stage, reasons in stages.items()
        for reason, count in reasons.items()
    ]
    text = _table(("status", "stage", "reason", "items"), rows) if rows else "Nothing was filtered and nothing failed."
    measured = [
        (name, f"{h['n']:,}", f"{h['mean']:.4g}", f"{h['min']:.4g}", f"{h['max']:.4g}")
        for name, h in report["facts"].items()
        if h["n"]
    ]
    if measured:
        text += "\n\nWhat stages measured, of all items:\n\n"
        text += _table(("fact", "n", "mean", "least", "most"), measured)
    return text


def _limits(report: Json) -> str:
    lines = ["Nobody has listened to or looked at all of it: programs made it and checked what they can check."]
    speech = report["media"].get(SPEECH, {"engines": []})
    if any(e["engine"].split(" ")[0] != "given" for e in speech["engines"]):  # recordings of the data are "given"
        number = sum(not voice.startswith("given/") for voice in speech.get("voices", {}))
        lines.append(
            f"Speech is synthetic ({number or 'an unknown number of'} voices): it has less noise, hesitation and "
            "variety than people have, and what a model learns from it may not hold for recordings."
        )
    if any(part.startswith(("wer", "cer")) for name in report["facts"] for part in name.split(".")):
        lines.append(
            "Word error rates are of a recogniser that errs itself: a low rate says that the words can be made out, a "
            "high one may be the recogniser's fault."
        )
    lines.append("Texts may say what is false. Names, opinions and events in them are not facts about anybody.")
    return "\n".join(f"- {line}" for line in lines)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *(tuple(map(_plain, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(text: str) -> str:
    """Text of others in Markdown: one line, nothing that formats, links or closes a cell."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Text of others between backticks."""
    return " ".join(text.replace("`", "'").split())


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: "(left out)" if SECRET.search(str(k)) else _without_secrets(v) for k, v in value.items()}
    return [_without_secrets(entry) for entry in value] if isinstance(value, list) else value
