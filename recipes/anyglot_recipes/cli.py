"""The `anyglot` command: parses arguments, calls one recipe or tool, and turns user errors into one clear line.

Exit codes: 0 done, 2 wrong use or input (no traceback), 1 a defect. With `--json` stdout holds one JSON object; logs go
to stderr. The work itself is in the sibling modules, which are imported only when their command runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from anyglot_recipes import (
    average_cli,
    chat_cli,
    dataset_cli,
    eval_cli,
    expand,
    export_cli,
    plan_cli,
    serve_cli,
    synth_cli,
    tokenizer_cli,
)
from anyglot_recipes.data_eval import cli as data_eval_cli
from anyglot_recipes.shipped import NANO, WEIGHTS
from anyglot_tokenizers.errors import AnyglotError
from anyglot_tokenizers.files import DISK_ERRORS

RECIPES = Path(__file__).parent / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["synth"] and words[1:2] and words[1] in dataset_cli.ACTIONS:
        words[0] = "dataset"  # what was made is looked at by the command that made it, too
    arguments = argparse.Namespace()
    try:
        arguments, rest = _parser().parse_known_args(words)
        if rest and arguments.command not in ("train", "synth"):
            _parser().error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.rest = rest
        if isinstance(name := getattr(arguments, "model", None), str):
            arguments.model = shipped_or_given(name)
        code: int = arguments.run(arguments) or 0
        return code
    except AnyglotError as error:
        print(f"anyglot: {error}", file=sys.stderr)
        return 2
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        if error.filename is None:
            raise
        print(f"anyglot: {error.filename}: {error.strerror}; check the path and its folder", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno is None or error.errno not in DISK_ERRORS:
            raise
        place = error.filename or getattr(arguments, "out", None) or "the disk"
        print(f"anyglot: {place}: {os.strerror(error.errno)}; free some space and run again", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in _EXTRAS:
            extra = _EXTRAS[error.name.split(".")[0]]
            print(
                f"anyglot: {error.name} is not installed; run: pip install 'anyglot[{extra}]'",
                file=sys.stderr,
            )
            return 2
        raise
    except KeyboardInterrupt:
        again = "; run the same command again to continue" if words[:1] in (["train"], ["prepare"], ["synth"]) else ""
        print(f"anyglot: stopped{again}", file=sys.stderr)
        return 130


def shipped_or_given(name: str) -> str:
    """The folder of a model that ships, by its name, unless there is a folder so named here; else the name itself."""
    shipped = WEIGHTS / name
    is_name = Path(name).name == name and (shipped / "vocabulary.json").is_file()
    return str(shipped) if is_name and not Path(name).exists() else name


_EXTRAS = {
    "transformers": "lm",
    "sentencepiece": "lm",
    "lightning": "train",
    "jsonargparse": "train",
    "matplotlib": "train",
    "peft": "train",
    "tensorboard": "train",
    "gguf": "lm",
    "pyarrow": "data",
    "scipy": "synth",
    "pocketsphinx": "judge",
    "jiwer": "synth",
    "py3langid": "synth",
    "yaml": "synth",
    "ray": "cluster",
    "diffusers": "pictures",
    "pesq": "eval",
    "pystoi": "eval",
    "visqol": "eval",
    "fastapi": "serve",
    "uvicorn": "serve",
    "python_multipart": "serve",
    "prometheus_client": "serve",
    "gradio": "web",
}


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return number


def _several(value: str) -> int:
    number = int(value)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{value} is less than 2")
    return number


_several.__name__ = "number"
_positive.__name__ = "number"  # argparse says "invalid number value"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anyglot", description="One language model for text, images, speech and music."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="every direction with the shipped model -> DIR/index.html and report.json")
    demo.add_argument("--out", default="demo", metavar="DIR")
    demo.add_argument("--model", default=str(NANO), metavar="DIR")
    demo.add_argument("--num", type=_positive, default=50, help="held-out samples per direction (default 50)")
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="run a training recipe", add_help=False)
    train.add_argument("recipe", nargs="?", help="a shipped recipe (nano, align, ...) or the path of a YAML file")
    train.set_defaults(run=_train)

    benchmarks = commands.add_parser("eval", help="run a benchmark, or compare reports of one").add_subparsers(
        dest="benchmark", required=True, metavar="BENCHMARK"
    )
    eval_cli.add_parser(benchmarks, str(NANO))
    data_eval_cli.add_parser(benchmarks, str(NANO), _positive)

    prepare = commands.add_parser("prepare", help="raw media and text -> codes and records")
    prepare.add_argument(
        "source",
        nargs="+",
        help="a manifest (CSV, TSV, JSONL), WebDataset tars, parquet or arrow, COCO captions, LibriSpeech, LJSpeech, "
        "AnyGPT JSONL, dialogues of anyglot synth, or a folder a label",
    )
    prepare.add_argument("--model", default=str(NANO), metavar="DIR", help="whose tokenizers encode")
    prepare.add_argument("--out", required=True, metavar="DIR")
    prepare.add_argument(
        "--column", action="append", default=[], metavar="NAME=MODALITY", help="what a manifest column holds"
    )
    prepare.add_argument("--images", metavar="DIR", help="folder of the pictures of COCO captions, if not beside them")
    prepare.add_argument(
        "--interleave", type=_several, default=0, metavar="ROWS", help="also documents of so many rows, all learnt"
    )
    prepare.add_argument(
        "--chain",
        choices=["none", "answer", "full"],
        default="none",
        help="of dialogues: the words of a spoken answer before it (answer), and what was heard before these (full)",
    )
    prepare.add_argument(
        "--shots",
        type=_positive,
        default=0,
        metavar="N",
        help="also few-shot documents: so many examples and a last row",
    )
    prepare.add_argument("--strict", action="store_true", help="exit with 2 if any row was bad")
    prepare.add_argument("--json", action="store_true", help="print one JSON object")
    prepare.set_defaults(run=_prepare)

    replay = commands.add_parser("replay", help="plain text files -> shards, so that a language is kept in training")
    replay.add_argument("file", nargs="+", help="UTF-8 text")
    replay.add_argument("--model", required=True, metavar="DIR", help="whose text tokenizer and vocabulary")
    replay.add_argument("--out", required=True, metavar="DIR")
    replay.add_argument("--max_ids", type=_positive, default=512, help="longest document (default 512)")
    replay.add_argument("--overwrite", action="store_true", help="replace shards that are there")
    replay.set_defaults(run=_replay)

    generate = commands.add_parser("generate", help="any mix in, any mix out")
    generate.add_argument("--model", default=str(NANO), metavar="DIR")
    for modality in ("text", "image", "speech", "music"):  # the model meets them in the order of the command line
        content, named = "TEXT" if modality == "text" else "FILE", partial(_named, modality)
        generate.add_argument(f"--{modality}", metavar=content, dest="given", action="append", type=named)
    generate.add_argument(
        "--to", required=True, help="text, image, speech, music, or several joined by commas; chain is text,text,speech"
    )
    generate.add_argument(
        "--examples",
        metavar="FILE",
        help='few-shot examples, JSONL of {"in": {"image": "a.png"}, "out": {"text": "red"}}',
    )
    generate.add_argument("--out", default="out", metavar="DIR")
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(run=_generate)

    average_cli.add_parser(commands)
    chat_cli.add_parser(commands, str(NANO))
    dataset_cli.add_parser(commands)
    tokenizer_cli.add_parser(commands)
    expand.add_parser(commands)
    export_cli.add_parser(commands)
    plan_cli.add_parser(commands)
    serve_cli.add_parser(commands, str(NANO))
    synth_cli.add_parser(commands)
    return parser


def _print_json(content: Any) -> None:
    print(json.dumps(content))


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _no_loading_bars() -> None:
    """stderr is for logs and the one line of an error."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _demo(arguments: argparse.Namespace) -> int:
    from anyglot_recipes.demo import demo

    _no_loading_bars()
    report = demo(arguments.model, arguments.out, num=arguments.num, progress=_log)
    _log(f"mean over the 12 directions {report['mean']}, {report['seconds']} s: open {arguments.out}/index.html")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from anyglot_recipes.train import run_recipe

    return run_recipe(arguments.recipe, arguments.rest)


def _prepare(arguments: argparse.Namespace) -> int:
    from anyglot_recipes.prepare_cli import prepare_command

    return prepare_command(arguments)


def _replay(arguments: argparse.Namespace) -> int:
    from anyglot_recipes.documents import write_text_shards

    files = [Path(file) for file in arguments.file]
    how = {"max_ids": arguments.max_ids, "overwrite": arguments.overwrite}
    number = write_text_shards(files, Path(arguments.model), Path(arguments.out), **how)
    _log(f"{arguments.out}: {number} documents of plain text")
    return 0


def _named(modality: str, content: str) -> tuple[str, str]:
    return modality, content


def _generate(arguments: argparse.Namespace) -> int:
    from anyglot_lm.engine import Sampling
    from anyglot_lm.grammar import read_order
    from anyglot_lm.unified import UnifiedModel
    from anyglot_recipes.documents import read_examples
    from anyglot_tokenizers.media import write_audio, write_image

    said = [(modality, content) for modality, content in arguments.given or () if content]
    if not said:
        raise AnyglotError("nothing was given; use at least one of --text, --image, --speech, --music")
    twice = sorted({f"--{modality}" for modality, _ in said if [m for m, _ in said].count(modality) > 1})
    if twice:
        raise AnyglotError(f"{', '.join(twice)}: give one of each; a conversation of more is for anyglot chat")
    _no_loading_bars()
    model = UnifiedModel.from_pretrained(arguments.model)
    given: dict[str, Any] = {m: content if m == "text" else model.read_media(m, content) for m, content in said}
    settings = Sampling(temperature=arguments.temperature)
    targets = read_order(arguments.to)
    examples = read_examples(Path(arguments.examples)) if arguments.examples else []
    sampling = dict.fromkeys(("text", *model.vocabulary.modalities), settings)
    outputs = model.generate(targets, sampling=sampling, seed=arguments.seed, examples=examples, **given)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for index, output in enumerate(outputs):
        if output.modality == "text":
            path = out / f"{index}-text.txt"
            path.write_text(f"{output.text}\n", encoding="utf-8")
            print(output.text)
            _log(str(path))
            continue
        assert output.media is not None
        rate = model.tokenizers[output.modality].spec.sample_rate
        path = out / f"{index}-{output.modality}.{'png' if rate is None else 'wav'}"
        write_image(path, output.media) if rate is None else write_audio(path, output.media, rate)
        _log(str(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
