"""Nanoworld's plain tasks as shards for a model that is there: replay while it learns something else, and controls.

    python -m anyglot_recipes.nano_pairs --model DIR --out pairs --num 1000

What a model of the `nano` recipe has learnt already (`tasks.py`), on new training scenes, in its own codes. Training
from nothing makes its own (`nano.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from anyglot_lm.parts import read_parts
from anyglot_lm.segments import Sample
from anyglot_lm.shards import ShardWriter
from anyglot_recipes.chain import seed_of
from anyglot_recipes.nano import make_items
from anyglot_recipes.tasks import TASKS, sample
from anyglot_synth.nanoworld.voices import SpeechCache, default_cache_dir
from anyglot_tokenizers.errors import CodesError


def write_nano_pairs(model_dir: str | Path, out: str | Path, num: int, seed: int = 0) -> int:
    """Write the shard folder `out`: every task of `num` training scenes, other ones than those of the `nano` recipe.

    Args:
        model_dir: whose tokenizers, vocabulary and template.
        out: a shard folder that is not there yet, or an older one, which is replaced.
        num: scenes.
        seed: of the scenes.

    Returns:
        The number of documents; those that the vocabulary cannot hold (a medium is too long) are left out.
    """
    vocabulary, template, text, tokenizers = read_parts(model_dir)
    cache = SpeechCache(default_cache_dir())
    items = make_items("train", num, seed_of(seed, "pairs") % 2**31, tokenizers, cache, 1)

    def documents() -> Iterator[tuple[str, Sample]]:
        rng = np.random.default_rng([seed, 79])
        for item in items:
            for task in TASKS:
                yield task, sample(item, task, rng)

    with ShardWriter(out, vocabulary, template, text=text, overwrite=Path(out).exists()) as writer:
        for task, document in documents():
            try:
                ids, loss = template.render(document, vocabulary, text)
            except CodesError:
                continue  # a medium that is too long for this vocabulary
            writer.add(ids, loss, task, document)
        return len(writer)


def main() -> None:
    """Command line of `write_nano_pairs`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="a model of the nano recipe")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--num", type=int, default=1000, help="scenes, 16 documents each (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    number = write_nano_pairs(arguments.model, arguments.out, arguments.num, arguments.seed)
    print(f"{arguments.out}: {number} documents")


if __name__ == "__main__":
    main()
