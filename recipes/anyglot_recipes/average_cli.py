"""`anyglot average`: the weighted mean of models that come of each other. The work is in `anyglot_lm.average`."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser("average", help="the weighted mean of a model and of what it was trained on to")
    parser.add_argument("model", nargs="+", metavar="DIR", help="model folders of one training")
    parser.add_argument("--weights", nargs="+", type=float, required=True, metavar="SHARE", help="of each, sum 1")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.set_defaults(run=average_command)


def average_command(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from transformers.utils import logging

    from anyglot_lm.average import average

    logging.disable_progress_bar()
    print(json.dumps(average(arguments.model, arguments.weights, arguments.out, overwrite=arguments.overwrite)))
    return 0
