"""`anyglot export`: model folder -> plain transformers folder with a card. The work is in `anyglot_lm.export`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser("export", help="model folder -> plain transformers folder with a model card")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model folder")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="of the weights (default: as they are stored)")
    parser.add_argument("--license", default="unknown", metavar="ID", help="of the model, as the hub names it")
    parser.add_argument("--base_model", metavar="ID", help="hub name of the language model that training started from")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=export_command)


def export_command(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from transformers.utils import logging

    from anyglot_lm.export import export

    logging.disable_progress_bar()
    report = export(
        arguments.model,
        arguments.out,
        dtype=arguments.dtype,
        license=arguments.license,
        base_model=arguments.base_model,
        overwrite=arguments.overwrite,
    )
    if arguments.json:
        print(json.dumps(report))
        return 0
    text = "AutoTokenizer" if report["auto_tokenizer"] else "text by AnyglotProcessor only"
    print(f"{arguments.out}: {report['architecture']}, {report['dtype']}, {text}", file=sys.stderr)
    return 0
