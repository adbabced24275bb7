"""`anyglot prepare`: finds out what sources hold, loads the tokenizers of a model, writes codes and shards."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from anyglot_lm.vocabulary import Vocabulary
from anyglot_recipes.importers.anygpt import is_anygpt, prepare_tokens
from anyglot_recipes.importers.dialogues import is_dialogues, read_dialogues, write_dialogues
from anyglot_recipes.pairs import write_pairs
from anyglot_recipes.prepare import ERRORS, RECORDS, prepare
from anyglot_tokenizers.errors import FingerprintError, ManifestError
from anyglot_tokenizers.tokenizer import Tokenizer, load

ROWS, TOKENS, DIALOGUES = "rows", "token strings", "dialogues"


def prepare_command(arguments: argparse.Namespace) -> int:
    """Encode `source` with the tokenizers of the folder `model` into `out`; the exit code.

    Rows that hold two things or more also become training samples, `out/shards` (see `pairs.py`); of dialogues each
    becomes one (see `importers/dialogues.py`). Sources that hold AnyGPT's token strings become such samples at once
    (see `importers/anygpt.py`); they need no media tokenizer.
    """
    folder, out = Path(arguments.model), Path(arguments.out)
    sources = [Path(source) for source in arguments.source]
    kind = _kind(sources)
    if kind != ROWS and (arguments.column or arguments.images or arguments.interleave or arguments.shots):
        raise ManifestError(f"{sources[0]} holds {kind}; leave out --column, --images, --interleave and --shots")
    if kind != DIALOGUES and arguments.chain != "none":
        raise ManifestError(f"--chain is for dialogues, {sources[0]} holds {kind}; leave it out")
    if kind == TOKENS:
        done = prepare_tokens(sources, folder, out, strict=arguments.strict)
        if arguments.json:
            print(json.dumps(done.to_dict()))
        else:
            print(f"{done.num_samples} training samples of {done.num_good} rows: {done.out_dir / 'shards'}")
            print(f"{done.num_bad} bad rows: {done.out_dir / ERRORS}")
        return 0
    tokenizers, image_size = _tokenizers(folder)
    settings: dict[str, Any] = {"strict": arguments.strict, "image_size": image_size}
    if kind == DIALOGUES:
        settings |= {"read": read_dialogues, "rows_per_shard": 128}  # a dialogue holds several files
    else:
        images = Path(arguments.images) if arguments.images else None
        settings |= {"columns": columns_of(arguments.column), "images": images}

    def progress(done: int, bad: int) -> None:
        print(f"{done} {kind}, {bad} of them bad", file=sys.stderr, flush=True)

    report = prepare(sources, tokenizers, out, progress=progress, **settings)
    if kind == DIALOGUES:
        samples, left_out = write_dialogues(report.out_dir, folder, chain=arguments.chain)
    else:
        samples, left_out = write_pairs(report.out_dir, folder, arguments.interleave, arguments.shots)
    if arguments.json:
        print(json.dumps({**report.to_dict(), "samples": samples, "samples_left_out": left_out}))
        return 0
    print(f"{report.num_good} {kind}: {report.out_dir / RECORDS}")
    print(f"{report.num_bad} bad {kind}: {report.out_dir / ERRORS}")
    if samples:
        why = "too long or without an answer" if kind == DIALOGUES else "too long"
        print(f"{samples} training samples: {report.out_dir / 'shards'}; {left_out} {why}")
    elif kind == DIALOGUES:
        print(f"no training samples: {left_out} dialogues are too long for the vocabulary or have nothing to learn")
    else:
        print(
            f"no training samples: {left_out} pairs are too long for the vocabulary, no row holds another; "
            "text comes from a manifest's column or the names of sub-folders"
        )
    return 0


def _kind(sources: list[Path]) -> str:
    """What all sources hold."""

    def kind_of(source: Path) -> str:
        return TOKENS if is_anygpt(source) else DIALOGUES if is_dialogues(source) else ROWS

    first, *others = [(source, kind_of(source)) for source in sources]
    for source, kind in others:
        if kind != first[1]:
            raise ManifestError(
                f"{first[0]} holds {first[1]}, {source} holds {kind}; prepare them apart, each with an --out of its own"
            )
    return first[1]


def columns_of(given: list[str]) -> dict[str, str]:
    """`--column NAME=MODALITY` options as column -> modality. Raises ManifestError for anything else."""
    columns = {}
    for pair in given:
        name, _, modality = pair.rpartition("=")
        if not name or not modality:
            raise ManifestError(f"--column {pair}: write NAME=MODALITY, such as --column file=image")
        columns[name] = modality
    return columns


def _tokenizers(folder: Path) -> tuple[dict[str, Tokenizer], int | None]:
    """The tokenizers of a model folder by modality, and the side in pixels of the pictures that it takes."""
    tokenizers: dict[str, Tokenizer] = {}
    image_sizes: set[int] = set()
    for block in Vocabulary.load(folder / "vocabulary.json").blocks:
        spec = (tokenizer := load(folder / "tokenizers" / block.modality)).spec
        if spec.fingerprint != block.fingerprint:
            raise FingerprintError(
                f"{folder}: the {block.modality} tokenizer ({spec.fingerprint[:12]}) is not the one the "
                f"vocabulary was made for ({block.fingerprint[:12]}); copy the whole model folder again"
            )
        tokenizers[block.modality] = tokenizer
        if spec.sample_rate is None and block.grid is not None:
            image_sizes |= {cells * (stride or 1) for cells, stride in zip(block.grid, spec.strides, strict=True)}
    if len(image_sizes) > 1:
        raise ManifestError(f"{folder}: takes images of several sizes {sorted(image_sizes)}; use prepare() for each")
    return tokenizers, image_sizes.pop() if image_sizes else None
