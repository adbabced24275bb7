"""`anyglot eval data`: parses arguments, loads the model and the judges, prints and writes the report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anyglot_tokenizers.errors import ManifestError


def add_parser(benchmarks: Any, model: str, positive: Callable[[str], int]) -> None:
    """Add `data` to the benchmarks of `anyglot eval`; `model` is the default folder."""
    parser = benchmarks.add_parser("data", help="one task on your own data, by the metrics of docs/evaluation.md")
    parser.add_argument(
        "source", help="a manifest, tars, tables, COCO captions, a speech corpus or a folder: as prepare reads"
    )
    parser.add_argument("--model", default=model, metavar="DIR", help="default: the shipped model")
    parser.add_argument(
        "--task", required=True, metavar="GIVEN->ASKED", help="such as 'image->text', 'text+image->speech'"
    )
    parser.add_argument(
        "--metrics",
        default="",
        metavar="NAMES",
        help="exact, cider, wer, cer, clip, clip_image, clap, retrieval, speaker, ranking; joined by commas "
        "(default: all that fit the task, the rows and the judges; wer and cer with speech)",
    )
    parser.add_argument("--num", type=positive, metavar="N", help="so many items, drawn with --seed (default: all)")
    parser.add_argument("--column", action="append", default=[], metavar="NAME=MODALITY", help="what a column holds")
    parser.add_argument("--images", metavar="DIR", help="folder of the pictures of COCO captions, if not beside them")
    parser.add_argument("--clip", metavar="WHICH", help="folder or hub id of a CLIP model")
    parser.add_argument("--clap", metavar="WHICH", help="folder or hub id of a CLAP model")
    parser.add_argument("--xvector", metavar="WHICH", help="folder or hub id of an x-vector model, for voices")
    parser.add_argument(
        "--recogniser", metavar="WHICH", help="what hears speech: sphinx, nanoworld, a folder, or JSON with engine"
    )
    parser.add_argument("--language", default="en", help="of the texts; in English (en, default) WER reads digits out")
    parser.add_argument("--candidates", type=positive, default=10, metavar="K", help="of ranking (default 10)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the answers (default 0: the likeliest)")
    parser.add_argument("--seed", type=int, default=0, help="of items, answers and candidates (default 0)")
    parser.add_argument("--batch_size", type=positive, default=32, metavar="N", help="answers at once (default 32)")
    parser.add_argument("--device", default="cpu", help="of the model, CLIP and CLAP (default cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model")
    parser.add_argument("--out", metavar="DIR", help="write report.json, report.md and what the model wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=data_command)


def data_command(arguments: argparse.Namespace) -> int:
    """Run `evaluate_data`; the exit code."""
    import torch
    from transformers.utils import logging

    from anyglot_lm.unified import UnifiedModel
    from anyglot_recipes.data_eval.evidence import Judges
    from anyglot_recipes.data_eval.report import markdown, write_folder
    from anyglot_recipes.data_eval.run import Settings, evaluate_data
    from anyglot_recipes.device import device_of
    from anyglot_recipes.metrics.clap import Clap
    from anyglot_recipes.metrics.clip import Clip
    from anyglot_recipes.metrics.speech import open_recogniser
    from anyglot_recipes.prepare_cli import columns_of
    from anyglot_tokenizers.plugs import speaker_encoder

    logging.disable_progress_bar()
    if arguments.out:
        source = Path(arguments.source).resolve()
        out = Path(arguments.out).resolve()
        if out == (source if source.is_dir() else source.parent) or source in out.parents:
            raise ManifestError(f"--out {arguments.out}: is in the folder of the source; write to a folder of its own")
        Path(arguments.out).mkdir(parents=True, exist_ok=True)  # a place that cannot be written to shows now
    device = device_of(arguments.device)
    judges = Judges(
        clip=Clip(arguments.clip, device=device) if arguments.clip else None,
        clap=Clap(arguments.clap, device=device) if arguments.clap else None,
        speaker=speaker_encoder(arguments.xvector) if arguments.xvector else None,
        speaker_name=arguments.xvector or "none",
        recogniser=open_recogniser(arguments.recogniser) if arguments.recogniser else None,
        language=arguments.language,
    )
    dtype = getattr(torch, arguments.dtype)
    report, evidence = evaluate_data(
        UnifiedModel.from_pretrained(arguments.model, dtype=dtype, device=device),
        arguments.source,
        arguments.task,
        metrics=[name for name in arguments.metrics.replace(" ", "").split(",") if name],
        judges=judges,
        settings=Settings(
            arguments.num, arguments.candidates, arguments.temperature, arguments.seed, arguments.batch_size
        ),
        columns=columns_of(arguments.column),
        images=Path(arguments.images) if arguments.images else None,
        where=arguments.model,
        progress=_log,
    )
    if arguments.out:
        write_folder(report, evidence, arguments.out)
        _log(f"{arguments.out}/report.md")
    print(json.dumps(report) if arguments.json else markdown(report), end="\n" if arguments.json else "")
    return 0


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
