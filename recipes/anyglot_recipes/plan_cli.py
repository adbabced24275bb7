"""`anyglot plan`: show what a plan or shard folders hold, build a plan, and (`cost_cli`) what training on it costs.

Parses arguments and prints; the work is in `anyglot_lm.plan` and `anyglot_lm.plan_view`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anyglot_recipes.cost_cli import add_cost_parser
from anyglot_tokenizers.errors import AnyglotError, ManifestError


def add_parser(commands: Any) -> None:
    """Add the command and its actions to the main parser."""
    parser = commands.add_parser("plan", help="the data of a run: what it holds, how it is mixed, what it costs")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    show = actions.add_parser("show", help="a plan, or shard folders, as a tree with counts and fingerprints")
    show.add_argument("path", nargs="+", help="a plan's folder, or shard folders")
    show.add_argument("--json", action="store_true", help="print one JSON object")
    show.set_defaults(run=_show)

    build = actions.add_parser("build", help="shard folders -> the plan of a run")
    build.add_argument("shards", nargs="+", help="shard folders")
    build.add_argument("--out", required=True, metavar="DIR")
    build.add_argument("--seq_len", type=int, required=True, metavar="N", help="ids of a row")
    length = build.add_mutually_exclusive_group()
    length.add_argument("--num_packs", type=int, metavar="N", help="rows: steps x accumulation x batch size x ranks")
    length.add_argument("--epochs", type=float, metavar="E", help="instead: that many times all ids")
    build.add_argument(
        "--weights", nargs="+", metavar="NAME=SHARE", help="share of ids per task or shard folder (default: natural)"
    )
    build.add_argument("--max_repetition", nargs="+", metavar="[NAME=]X", help="epochs that a source may be seen")
    build.add_argument(
        "--limit", choices=["raise", "cap"], default="raise", help="beyond that: an error, or the rest to the others"
    )
    build.add_argument("--modality_budgets", nargs="+", metavar="NAME=SHARE", help="share of ids per modality")
    build.add_argument(
        "--condition_dropout", type=float, default=0.0, metavar="P", help="documents without their prompt"
    )
    build.add_argument("--phases", metavar="FILE", help="a curriculum: JSON list of the options above, one per phase")
    build.add_argument("--seed", type=int, default=0)
    build.add_argument("--json", action="store_true", help="print one JSON object")
    build.set_defaults(run=_build)

    add_cost_parser(actions)


def _show(arguments: argparse.Namespace) -> int:
    from anyglot_lm.plan import Plan
    from anyglot_lm.plan_view import describe_plan, describe_shards, plan_to_dict, shard_to_dict
    from anyglot_lm.shards import open_shards

    paths = [Path(path) for path in arguments.path]
    plans = [path for path in paths if (path / "plan.json").exists()]
    if plans and len(paths) > 1:
        raise AnyglotError(f"{plans[0]}: is a plan; show one plan, or any number of shard folders")
    if plans:
        plan = Plan.load(plans[0])
        print(json.dumps(plan_to_dict(plan)) if arguments.json else describe_plan(plan, fingerprints=True))
        return 0
    readers = open_shards([_shards_of(path) for path in paths])
    if arguments.json:
        print(json.dumps({"shards": [shard_to_dict(reader) for reader in readers]}))
    else:
        print(describe_shards(readers))
    return 0


def _shards_of(path: Path) -> Path:
    """A shard folder, or the one in a folder that `prepare` made."""
    inner = path / "shards"
    return inner if not (path / "meta.json").exists() and (inner / "meta.json").exists() else path


def _build(arguments: argparse.Namespace) -> int:
    from anyglot_lm.phases import Phase
    from anyglot_lm.plan import build_plan
    from anyglot_lm.plan_view import describe_plan, plan_to_dict

    single: dict[str, Any] = {
        "weights": _numbers(arguments.weights, "--weights"),
        "max_repetition": _limits(arguments.max_repetition),
        "limit": arguments.limit,
        "modality_budgets": _numbers(arguments.modality_budgets, "--modality_budgets"),
        "condition_dropout": arguments.condition_dropout,
    }
    phases = None
    if arguments.phases is not None:
        try:
            content = json.loads(Path(arguments.phases).read_text(encoding="utf-8"))
            phases = [Phase(**entry) for entry in content]
        except (ValueError, TypeError) as error:
            raise ManifestError(
                f"{arguments.phases}: {error}; it holds a JSON list of objects with num_packs or share, and weights, "
                "max_repetition, limit, modality_budgets, condition_dropout"
            ) from error
    plan = build_plan(
        [_shards_of(Path(path)) for path in arguments.shards],
        seq_len=arguments.seq_len,
        num_packs=arguments.num_packs,
        epochs=arguments.epochs,
        seed=arguments.seed,
        phases=phases,
        path=arguments.out,
        **single,
    )
    print(json.dumps(plan_to_dict(plan)) if arguments.json else describe_plan(plan, fingerprints=True))
    print(arguments.out, file=sys.stderr)
    return 0


def _numbers(pairs: Sequence[str] | None, option: str) -> dict[str, float] | None:
    """`name=number` pairs as a mapping."""
    if pairs is None:
        return None
    result = {}
    for pair in pairs:
        name, _, value = pair.rpartition("=")
        try:
            result[name] = float(value)
        except ValueError:
            name = ""
        if not name:
            raise AnyglotError(f"{option} {pair!r}: give NAME=NUMBER, such as text=0.3")
    return result


def _limits(values: Sequence[str] | None) -> float | dict[str, float] | None:
    """One number for all sources, or a mapping."""
    if values is not None and len(values) == 1 and "=" not in values[0]:
        try:
            return float(values[0])
        except ValueError as error:
            raise AnyglotError(f"--max_repetition {values[0]!r}: give a number, or NAME=NUMBER") from error
    return _numbers(values, "--max_repetition")
