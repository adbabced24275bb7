"""Shards of an older vocabulary, written again for one that has more blocks.

Ids move when a modality is added (`vocabulary.id_map`); documents, targets and tasks stay the same, and the writer
checks them as it checks new ones.
"""

from __future__ import annotations

from pathlib import Path

from anyglot_lm.shards import ShardReader, ShardWriter
from anyglot_lm.vocabulary import Vocabulary, id_map


def remap_shards(path: str | Path, out: str | Path, new_vocabulary: Vocabulary, *, overwrite: bool = False) -> int:
    """Writes the shard folder `path` to `out` with the ids of `new_vocabulary`.

    Args:
        path: a shard folder.
        out: the folder to make.
        new_vocabulary: with the text and all blocks of the folder's own, and more.
        overwrite: replace `out` if it exists.

    Returns:
        The number of documents.

    Raises:
        FingerprintError: the new vocabulary lacks something of the old one.
        ShardError, ManifestError: `path` is no sound shard folder, or `out` exists.
    """
    reader = ShardReader(path)
    places = id_map(reader.vocabulary, new_vocabulary)
    with ShardWriter(out, new_vocabulary, reader.template, overwrite=overwrite) as writer:
        for index, task in enumerate(reader.tasks):
            ids, loss = reader.doc(index)
            writer.add(places[ids], loss, reader.task_names[task], reader.sample(index))
    return len(reader)
