"""`anyglot expand`: the first model folder of a training, from a pretrained language model and media tokenizers.

Either a backbone gets a row for every code of the tokenizers, or a model folder that exists gets those of one more
modality. Nothing is trained here; what comes out knows its old text (or media) exactly as before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from anyglot_tokenizers.errors import AnyglotError, ManifestError

if TYPE_CHECKING:
    from anyglot_lm.unified import UnifiedModel
    from anyglot_lm.vocabulary import BlockSpec, Vocabulary
    from anyglot_tokenizers.tokenizer import Tokenizer

BLOCK_KEYS = {"num_quantizers": int, "pattern": str, "input_pattern": str, "grid": str, "max_frames": int}


def add_parser(commands: Any) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser("expand", help="pretrained language model + media tokenizers -> model folder")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--backbone", metavar="WHICH", help="folder or hub id of a causal language model")
    start.add_argument("--model", metavar="DIR", help="a model folder, to add modalities to")
    parser.add_argument("--gguf_file", metavar="FILE", help="of the backbone, read instead of safetensors")
    parser.add_argument(
        "--tokenizers",
        "--add",
        dest="tokenizers",
        nargs="+",
        required=True,
        metavar="[MODALITY=]WHICH",
        help="folder or hub id of a tokenizer, or a folder with one in each of its folders",
    )
    parser.add_argument(
        "--blocks",
        nargs="+",
        default=[],
        metavar="MODALITY.KEY=VALUE",
        help=f"how a modality is written ({', '.join(BLOCK_KEYS)}), e.g. image.grid=16x16 speech.max_frames=500",
    )
    parser.add_argument("--init", default="covariance", help="random, mean, covariance (default) or codebook")
    parser.add_argument("--head_noise", type=float, default=0.1, help="spread of the head's new rows (default 0.1)")
    parser.add_argument("--overwrite", action="store_true", help="put new rows over those of the rarest text pieces")
    parser.add_argument("--rope_scaling", metavar="TYPE:FACTOR", help="e.g. yarn:2 for twice as long inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=expand_command)


def expand_command(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from anyglot_lm.unified import UnifiedModel

    out = Path(arguments.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ManifestError(f"{out}: exists already; delete it, or give another --out")
    tokenizers = open_tokenizers(arguments.tokenizers)
    blocks = parse_blocks(arguments.blocks)
    if arguments.model is not None:
        if arguments.overwrite or arguments.gguf_file or arguments.rope_scaling:
            raise AnyglotError("--model takes no --overwrite, --gguf_file or --rope_scaling; they are for --backbone")
        model = UnifiedModel.from_pretrained(arguments.model)
        how = {"init": arguments.init, "head_noise": arguments.head_noise, "seed": arguments.seed}
        model = add_modalities(model, tokenizers, blocks, **how)
    else:
        model = expand(
            arguments.backbone,
            tokenizers,
            blocks,
            gguf_file=arguments.gguf_file,
            init=arguments.init,
            head_noise=arguments.head_noise,
            overwrite=arguments.overwrite,
            rope_scaling=_rope_scaling(arguments.rope_scaling),
            seed=arguments.seed,
        )
    model.save_pretrained(arguments.out)
    report = {
        "out": arguments.out,
        "rows": model.model.config.vocab_size,
        "ids": model.vocabulary.size,
        "text": model.vocabulary.text_size,
        "modalities": list(model.vocabulary.modalities),
        "vocabulary": model.vocabulary.fingerprint,
    }
    if arguments.json:
        print(json.dumps(report))
    else:
        text = f"{report['text']} of text, modalities {', '.join(model.vocabulary.modalities)}"
        print(f"{arguments.out}: {report['ids']} ids ({text})", file=sys.stderr)
    return 0


def expand(
    backbone: str | Path,
    tokenizers: Mapping[str, Tokenizer],
    blocks: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    gguf_file: str | None = None,
    init: str = "covariance",
    head_noise: float = 0.1,
    overwrite: bool = False,
    rope_scaling: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> UnifiedModel:
    """A backbone with rows for the codes of `tokenizers`; bos, eos and roles start from its own words for them.

    Args:
        backbone: folder or hub name, see `load_backbone`.
        tokenizers: by modality.
        blocks: by modality, how it is written: `num_quantizers`, `pattern`, `input_pattern`, `grid`, `max_frames` of
            `BlockSpec.from_code_spec`. Images need a grid and have the pattern raster by default.
        gguf_file: see `load_backbone`.
        init: how new rows start, see `anyglot_lm.rows`.
        head_noise: spread of new rows of the head (of a tied model: of both ends), in that of old ones. 0.1 starts
            near the uniform loss; 1 tells media apart from the first step, for models that only read them.
        overwrite: instead of adding rows, overwrite those of the rarest pieces of text.
        rope_scaling: see `load_backbone`.
        seed: of the new rows.
    """
    from anyglot_lm.backbone import load_backbone
    from anyglot_lm.hf_text import HFTextTokenizer
    from anyglot_lm.model import assert_no_leak, expand_vocabulary
    from anyglot_lm.segments import Template
    from anyglot_lm.unified import UnifiedModel
    from anyglot_lm.vocabulary import Vocabulary

    specs = block_specs(tokenizers, blocks or {})
    text = HFTextTokenizer.from_backbone(backbone, gguf_file=gguf_file)
    model = load_backbone(backbone, gguf_file=gguf_file, rope_scaling=rope_scaling)
    assert_no_leak(model)
    controls_from: dict[str, int | Sequence[int]] = {role: text.encode(role) for role in ("user", "assistant")}
    for name in ("bos", "eos"):
        known = getattr(model.config, f"{name}_token_id")
        if known is not None:
            controls_from[name] = known
    rows = int(model.config.vocab_size)
    text_size = room_for_text(rows, specs) if overwrite else max(rows, text.size)
    if overwrite:
        text = text.truncated(min(text_size, text.size))
    vocabulary = Vocabulary.build(text_size, *specs, text_fingerprint=text.fingerprint)
    expand_vocabulary(
        model,
        vocabulary,
        init=_init(init),
        codebooks=_codebooks(tokenizers),
        controls_from=controls_from,
        head_noise=head_noise,
        overwrite=overwrite,
        seed=seed,
    )
    return UnifiedModel(model, vocabulary, Template(version=2), text, tokenizers, where=str(backbone))


def add_modalities(
    model: UnifiedModel,
    tokenizers: Mapping[str, Tokenizer],
    blocks: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    init: str = "covariance",
    head_noise: float = 0.1,
    seed: int = 0,
) -> UnifiedModel:
    """`model` with rows for more modalities; what it knows keeps every bit. Changes `model.model` in place.

    Shards follow with `anyglot_lm.remap.remap_shards`. Arguments as for `expand`.
    """
    from anyglot_lm.model import extend_vocabulary
    from anyglot_lm.unified import UnifiedModel

    vocabulary: Vocabulary = model.vocabulary.extended(*block_specs(tokenizers, blocks or {}))
    extend_vocabulary(
        model.model,
        model.vocabulary,
        vocabulary,
        init=_init(init),
        codebooks=_codebooks(tokenizers),
        head_noise=head_noise,
        seed=seed,
    )
    return UnifiedModel(model.model, vocabulary, model.template, model.text, {**model.tokenizers, **tokenizers})


def room_for_text(rows: int, specs: Sequence[BlockSpec]) -> int:
    """The most text ids that leave room for the rest within `rows` rows. Raises `ManifestError` if none do."""
    from anyglot_lm.vocabulary import MULTIPLE, Vocabulary

    probe = Vocabulary.build(1, *specs)
    taken = (probe.blocks[-1].stop_id if probe.blocks else probe.open_size) - 1
    room = rows // MULTIPLE * MULTIPLE - taken
    if room < 1:
        raise ManifestError(f"{rows} rows cannot hold {taken} ids of media; expand without overwriting")
    return room


def open_tokenizers(entries: Sequence[str]) -> dict[str, Tokenizer]:
    """`music=DIR`, a tokenizer's folder or hub name, or a folder that holds tokenizers -> tokenizers by modality."""
    from anyglot_tokenizers import load

    found: dict[str, Tokenizer] = {}
    for entry in entries:
        modality, _, place = entry.rpartition("=")
        folder = Path(place)
        many = not modality and folder.is_dir() and not (folder / "config.json").is_file()
        places = sorted(str(path) for path in folder.iterdir() if path.is_dir()) if many else [place]
        if not places:
            raise ManifestError(f"{entry}: holds no tokenizers; give their folders")
        for path in places:
            tokenizer = load(path)
            name = modality or tokenizer.spec.modality
            if name in found:
                raise ManifestError(f"{path}: a second tokenizer for {name!r}; give one per modality (MODALITY=DIR)")
            found[name] = tokenizer
    return found


def parse_blocks(entries: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`["image.grid=16x16", ...]` -> `{"image": {"grid": (16, 16)}, ...}`."""
    blocks: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        modality, _, key = name.rpartition(".")
        if not equals or not modality or key not in BLOCK_KEYS:
            raise ManifestError(f"--blocks {entry}: write MODALITY.KEY=VALUE, KEY one of {', '.join(BLOCK_KEYS)}")
        try:
            parsed = tuple(map(int, value.split("x"))) if key == "grid" else BLOCK_KEYS[key](value)
        except ValueError as error:
            raise ManifestError(f"--blocks {entry}: {value!r} is no number (a grid is like 16x16)") from error
        blocks.setdefault(modality, {})[key] = parsed
    return blocks


def block_specs(tokenizers: Mapping[str, Tokenizer], blocks: Mapping[str, Mapping[str, Any]]) -> list[BlockSpec]:
    """The blocks of some tokenizers, in their order."""
    from dataclasses import replace

    from anyglot_lm.vocabulary import BlockSpec

    unknown = sorted(set(blocks) - set(tokenizers))
    if unknown:
        raise ManifestError(
            f"blocks for {unknown[0]!r}, which has no tokenizer here; there are {', '.join(tokenizers)}"
        )
    specs = []
    for modality, tokenizer in tokenizers.items():
        how = dict(blocks.get(modality, {}))
        if tokenizer.spec.axes != ("time",):
            if "grid" not in how:
                raise ManifestError(
                    f"{modality}: its codes lie on a grid of axes {', '.join(tokenizer.spec.axes)}; say how large "
                    f"it is, e.g. --blocks {modality}.grid=16x16"
                )
            how.setdefault("pattern", "raster")
        specs.append(replace(BlockSpec.from_code_spec(tokenizer.spec, **how), modality=modality))
    return specs


def _codebooks(tokenizers: Mapping[str, Tokenizer]) -> dict[str, Any]:
    return {name: tokenizer.codebooks for name, tokenizer in tokenizers.items() if tokenizer.codebooks is not None}


def _init(name: str) -> Any:
    from anyglot_lm.rows import Init

    if name not in get_args(Init):
        raise AnyglotError(f"init={name!r}; use one of {', '.join(get_args(Init))}")
    return name


def _rope_scaling(value: str | None) -> dict[str, Any] | None:
    if value is None:
        return None
    kind, _, factor = value.partition(":")
    try:
        return {"type": kind, "factor": float(factor)}
    except ValueError as error:
        raise AnyglotError(f"--rope_scaling {value}: write TYPE:FACTOR, e.g. yarn:2") from error
