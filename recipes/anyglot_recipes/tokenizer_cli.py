"""`anyglot tokenizer`: list, describe, run, measure and convert tokenizers. Needs the base install only.

Parses arguments and prints; the work is in `anyglot_tokenizers`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyglot_recipes.shipped import NANO
from anyglot_tokenizers.errors import AnyglotError

if TYPE_CHECKING:
    from anyglot_tokenizers.tokenizer import Tokenizer

MAX_SECONDS = 4 * 3600.0
"""Of audio files; four hours at 24 kHz are 1.4 GB."""
WHICH = "folder, hub id (owner/name), or image, speech or music for the shipped one"


def add_parser(commands: Any) -> None:
    """Add the command and its actions to the main parser."""
    parser = commands.add_parser("tokenizer", help="media to codes and back")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    listed = actions.add_parser("list", help="published and shipped tokenizers, with rate, bitrate and licence")
    listed.add_argument("--json", action="store_true", help="print one JSON object")
    listed.add_argument("--markdown", action="store_true", help="print the published ones as a Markdown table")
    listed.set_defaults(run=_list)

    info = actions.add_parser("info", help="the spec of one tokenizer, as JSON")
    info.add_argument("tokenizer", help=WHICH)
    info.set_defaults(run=_info)

    for action, what, run in (
        ("encode", "media file -> codes file (safetensors)", _encode),
        ("decode", "codes file -> media file", _decode),
    ):
        coder = actions.add_parser(action, help=what)
        coder.add_argument("tokenizer", help=WHICH)
        coder.add_argument("input")
        coder.add_argument("output")
        coder.add_argument("--num-quantizers", type=int, metavar="K", help="use only the first K codebooks")
        coder.set_defaults(run=run)

    measure = actions.add_parser("eval", help="reconstruction, code usage, speed, miss rates, meaning; with a report")
    measure.add_argument("tokenizer", help=WHICH)
    measure.add_argument("media", nargs="+", help="files or folders the tokenizer was never trained on")
    measure.add_argument("--out", metavar="DIR", help="write index.html, report.md and report.json with media here")
    measure.add_argument("--num-quantizers", type=int, metavar="K", help="use only the first K codebooks")
    measure.add_argument("--limit", type=int, metavar="N", help="measure N files, evenly spaced")
    measure.add_argument(
        "--labels", metavar="REGEX", help="on file names; its groups `label` and, to hold out, `group` feed the probe"
    )
    measure.add_argument(
        "--recogniser", metavar="WHICH", help="for the word error rate: sphinx, or a folder or hub id (transformers)"
    )
    measure.add_argument(
        "--speaker", metavar="WHICH", help="for speaker similarity: folder or hub id of an x-vector model"
    )
    measure.add_argument("--feature", metavar="WHICH", help="for LPIPS and rFID: folder or hub id of a vision model")
    measure.add_argument("--json", action="store_true", help="print one JSON object")
    measure.set_defaults(run=_eval)

    convert = actions.add_parser("convert", help="a publisher's pickled checkpoint, which you trust -> safetensors")
    convert.add_argument("checkpoint", help=".pt, .pth, .bin, .ckpt or .th file")
    convert.add_argument("--kind", help="snac, speechtokenizer, vqgan or encodec, where the file does not tell")
    convert.add_argument("--license", default="unknown", help="of the weights, see anyglot tokenizer list")
    convert.add_argument("--config", help="the publisher's configuration file, where it has one")
    convert.add_argument("--out", required=True, metavar="DIR")
    convert.set_defaults(run=_convert)


def open_tokenizer(name: str) -> Tokenizer:
    """A shipped tokenizer by its modality, or any folder or hub id."""
    from anyglot_tokenizers import load

    shipped = NANO / "tokenizers" / name
    return load(shipped if "/" not in name and shipped.is_dir() else name)


def _list(arguments: argparse.Namespace) -> int:
    from anyglot_tokenizers.catalog import CATALOG, is_commercial

    shipped = {folder.name: open_tokenizer(folder.name).spec for folder in sorted((NANO / "tokenizers").iterdir())}
    if arguments.json:
        published = [{**vars(e), "bitrate": e.bitrate, "commercial": is_commercial(e.license)} for e in CATALOG]
        print(json.dumps({"shipped": {k: s.to_dict() for k, s in shipped.items()}, "published": published}))
        return 0
    if arguments.markdown:
        print(published_table(), end="")
        return 0
    line = "{:22s} {:8s} {:>6s} {:>8s} {:>10s} {:>7s}  {:14s} {}"
    print(line.format("name", "media", "Hz", "codes/s", "codebooks", "kbit/s", "licence", "load with"))
    for name, spec in shipped.items():
        books = f"{spec.num_quantizers} x {max(spec.codebook_sizes)}"
        rate, speed, bits = "", "", ""
        if spec.sample_rate is not None:
            rate, speed, bits = str(spec.sample_rate), f"{spec.frame_rate:.1f}", f"{spec.bitrate / 1000:.2f}"
        print(line.format(f"shipped {name}", spec.modality, rate, speed, books, bits, spec.license, name))
    for e in CATALOG:
        rate = str(e.sample_rate or "")
        speed = f"{e.frame_rate:.1f}" if e.frame_rate else ""
        bits = f"{e.bitrate / 1000:.2f}" if e.bitrate else ""
        license = e.license if is_commercial(e.license) else f"{e.license} (!)"
        how = f"anyglot tokenizer convert --kind {e.convert}" if e.convert else ""
        how = f"{e.hub_id} ({how})" if e.hub_id and how else e.hub_id or how
        print(
            line.format(e.name, e.modality, rate, speed, f"{e.num_quantizers} x {e.codebook_size}", bits, license, how)
        )
    print("(!) not for commercial use, or not known")
    return 0


def published_table() -> str:
    """The catalogue of published tokenizers as a Markdown table, as in docs/tokenizers.md."""
    from anyglot_tokenizers.catalog import CATALOG, is_commercial

    lines = ["| name | media | rate | codes | bitrate | licence of the weights | from |", "|---" * 7 + "|"]
    for e in CATALOG:
        cells = [
            e.name,
            e.modality,
            f"{e.sample_rate / 1000:g} kHz" if e.sample_rate else "",
            (f"{e.frame_rate:.4g} a second x " if e.frame_rate else "") + f"{e.num_quantizers} of {e.codebook_size}",
            f"{e.bitrate / 1000:.3g} kbit/s" if e.bitrate else "",
            e.license if is_commercial(e.license) else f"{e.license} (warns)",
            ", ".join(part for part in (e.hub_id, f"convert --kind {e.convert}" if e.convert else "") if part),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _info(arguments: argparse.Namespace) -> int:
    print(json.dumps(open_tokenizer(arguments.tokenizer).spec.to_dict()))
    return 0


def _encode(arguments: argparse.Namespace) -> int:
    from anyglot_tokenizers.evaluation import read_medium

    tokenizer = open_tokenizer(arguments.tokenizer)
    media = read_medium(Path(arguments.input), tokenizer, max_seconds=MAX_SECONDS)
    tokenizer.encode(media[None], num_quantizers=arguments.num_quantizers).save(arguments.output)
    print(arguments.output, file=sys.stderr)
    return 0


def _decode(arguments: argparse.Namespace) -> int:
    from anyglot_tokenizers import Codes, write_audio, write_image
    from anyglot_tokenizers.checks import check_count

    tokenizer = open_tokenizer(arguments.tokenizer)
    spec = tokenizer.spec
    codes = Codes.load(arguments.input)
    if len(codes) != 1:
        raise AnyglotError(
            f"{arguments.input}: holds {len(codes)} items; decode them in Python, with load and Codes.load"
        )
    if arguments.num_quantizers is not None:
        codes.codes = codes.codes[:, : check_count(arguments.num_quantizers, codes.codes.shape[1])]
    media = tokenizer.decode(codes)[0]
    if spec.sample_rate is None:
        write_image(arguments.output, media)
    else:
        write_audio(arguments.output, media, spec.sample_rate)
    print(arguments.output, file=sys.stderr)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from anyglot_tokenizers.evaluation import evaluate_command

    return evaluate_command(arguments, open_tokenizer(arguments.tokenizer))


def _convert(arguments: argparse.Namespace) -> int:
    from anyglot_tokenizers.convert import convert

    tokenizer = convert(
        arguments.checkpoint, arguments.out, kind=arguments.kind, config=arguments.config, license=arguments.license
    )
    print(f"{arguments.out}: {type(tokenizer).__name__}", file=sys.stderr)
    return 0
