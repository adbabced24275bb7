"""The id space of a unified language model: text, controls and one block of ids per modality.

    [ text 0..text_size ) [ pad bos eos user assistant ) [ start of every block )   the "open" slice
    [ end | K * codebook_size codes )    one block per modality, in order
    [ unused ids up to a multiple of 128 )

Ids are arithmetic, `first_id + codebook * codebook_size + code`: never strings, never a lookup in the text
tokenizer, so user text cannot produce a control or a code. The layout makes the legal ids at every position
one contiguous range (`slice_table`), so that a loss or a sampler needs only `weight[lo:hi]`.

This file knows no text tokenizer and no template, and moves no media.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from anyglot_lm.blocks import Block as Block
from anyglot_lm.blocks import BlockSpec as BlockSpec
from anyglot_lm.blocks import Direction as Direction
from anyglot_lm.blocks import make_block, spec_of
from anyglot_lm.files import fingerprint_of, read_json, write_json
from anyglot_lm.patterns import Int64
from anyglot_tokenizers.errors import CodesError, FingerprintError, ManifestError

CONTROLS = ("pad", "bos", "eos", "user", "assistant")
MULTIPLE = 128
FORMAT = "anyglot-vocabulary"
VERSION = 1


@dataclass(frozen=True)
class Run:
    """A stretch `[start, stop)` of ids: text, one control, or one whole span with its start and end id."""

    kind: Literal["text", "control", "media"]
    name: str
    """"text", the name of the control, or the modality."""
    start: int
    stop: int


@dataclass(frozen=True)
class Vocabulary:
    """The layout of all ids. Make one with `Vocabulary.build`; two are the same if their `fingerprint`s are.

    Attributes:
        text_size: ids of the text tokenizer, `[0, text_size)`.
        text_fingerprint: fingerprint of the text tokenizer, "" if unknown.
        controls: name -> id of pad, bos, eos, user, assistant.
        blocks: one per modality.
        open_size: text, control and start ids are `[0, open_size)`.
        size: number of ids, padded to a multiple of 128 (rows of the embedding).
    """

    text_size: int
    text_fingerprint: str
    controls: Mapping[str, int]
    blocks: tuple[Block, ...]
    open_size: int
    size: int

    @classmethod
    def build(cls, text_size: int, *specs: BlockSpec, text_fingerprint: str = "") -> Vocabulary:
        """Lays the ids out: text, controls, start ids, then one block per spec in the given order.

        Raises:
            ManifestError: for a modality named twice, an unknown pattern, or sizes that make no sense.
        """
        if text_size < 1:
            raise ManifestError(f"text_size={text_size}; a vocabulary needs at least one text id")
        names = [s.modality for s in specs]
        for name in names:
            if names.count(name) > 1 or name in ("text", ""):
                raise ManifestError(f"modality {name!r} is named twice or reserved; give every block its own name")
        controls = {name: text_size + i for i, name in enumerate(CONTROLS)}
        first_start = text_size + len(CONTROLS)
        open_size = first_start + len(specs)
        blocks = []
        next_id = open_size
        for i, spec in enumerate(specs):
            block = make_block(spec, start_id=first_start + i, end_id=next_id)
            blocks.append(block)
            next_id = block.stop_id
        size = -(-next_id // MULTIPLE) * MULTIPLE
        return cls(text_size, text_fingerprint, controls, tuple(blocks), open_size, size)

    def extended(self, *specs: BlockSpec) -> Vocabulary:
        """The same text and blocks, and more blocks after them. Start ids lie before the blocks: ids move (`id_map`).

        Raises:
            ManifestError: as for `build`.
        """
        known = [spec_of(entry) for entry in self.to_dict()["blocks"]]
        return self.build(self.text_size, *known, *specs, text_fingerprint=self.text_fingerprint)

    def with_fingerprints(self, fingerprints: Mapping[str, str]) -> Vocabulary:
        """The same ids for other tokenizers. Only for codes that mean the same (`denoise.py`): nothing checks that.

        Args:
            fingerprints: by modality; of blocks that are not named they stay.

        Raises:
            ManifestError: a modality that there is not.
        """
        for modality in fingerprints:
            self.block(modality)
        blocks = tuple(replace(b, fingerprint=fingerprints.get(b.modality, b.fingerprint)) for b in self.blocks)
        return replace(self, blocks=blocks)

    @property
    def pad_id(self) -> int:
        return self.controls["pad"]

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the blocks, in order; "text" is not among them."""
        return tuple(b.modality for b in self.blocks)

    @cached_property
    def _by_modality(self) -> dict[str, Block]:
        return {b.modality: b for b in self.blocks}

    @cached_property
    def _by_start(self) -> dict[int, Block]:
        return {b.start_id: b for b in self.blocks}

    @cached_property
    def _control_names(self) -> dict[int, str]:
        return {i: name for name, i in self.controls.items()}

    def block(self, modality: str) -> Block:
        """The block of a modality. Raises `ManifestError` if there is none."""
        if modality not in self._by_modality:
            known = ", ".join(self.modalities) or "none"
            raise ManifestError(f"this vocabulary has no modality {modality!r}; it has: {known}")
        return self._by_modality[modality]

    def block_of_start(self, start_id: int) -> Block | None:
        """The block whose spans `start_id` opens, or None if it is no start id."""
        return self._by_start.get(start_id)

    # codes <-> ids

    def span(self, modality: str, codes: Any, direction: Direction = "output") -> Int64:
        """Codes int `[K', *grid]` -> ids int64 `[N]`: start id, flat codes in the direction's pattern, end id.

        A tokenizer may give more quantizers than the LM uses: the first `num_quantizers` are taken.

        Raises:
            CodesError: too few quantizers, a code outside its codebook, a wrong grid, or a span that is too
            long.
        """
        block = self.block(modality)
        order = block.pattern_of(direction)
        array = np.asarray(codes)
        if array.ndim < 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
            raise CodesError(
                f"{modality}: codes must be a non-empty integer array [quantizers, *grid], got {array.dtype} "
                f"of shape {array.shape}; add the quantizer axis with codes[None] if it is missing"
            )
        needed = order.num_codebooks(block.num_quantizers)
        if array.shape[0] < needed:
            raise CodesError(
                f"{modality}: codes have {array.shape[0]} quantizers but {direction} spans need {needed}; "
                f"encode with num_quantizers={needed} or more"
            )
        if block.grid is not None and tuple(array.shape[1:]) != block.grid:
            raise CodesError(
                f"{modality}: codes have the grid {tuple(array.shape[1:])} but the vocabulary fixes "
                f"{block.grid}; resize the media or build the vocabulary for this grid"
            )
        array = array[:needed].astype(np.int64, copy=False)
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= block.codebook_size:
            bad = low if low < 0 else high
            raise CodesError(
                f"{modality}: code {bad} is outside the codebook [0, {block.codebook_size}); were these "
                "codes made by another tokenizer?"
            )
        flat = order.flatten(array)
        if direction == "output" and block.max_length is not None and len(flat) > block.max_length:
            raise CodesError(
                f"{modality}: a span of {len(flat)} codes is longer than the block's max_length "
                f"{block.max_length}; cut the media or build the vocabulary with a larger max_frames"
            )
        ids = np.empty(len(flat) + 2, dtype=np.int64)
        ids[0], ids[-1] = block.start_id, block.end_id
        ids[1:-1] = block.first_id + flat
        if needed > 1:
            ids[1:-1] += order.codebooks(len(flat), block.num_quantizers) * block.codebook_size
        return ids

    def codes(self, modality: str, flat_ids: Any, direction: Direction = "output") -> Int64:
        """Exact inverse of `span`: ids int `[N]` without start and end -> codes int64 `[k, *grid]`.

        Raises:
            CodesError: a length that is no whole span, or an id that is illegal at its position.
        """
        block = self.block(modality)
        order = block.pattern_of(direction)
        ids = np.asarray(flat_ids, dtype=np.int64)
        if ids.ndim != 1:
            raise CodesError(f"{modality}: flat ids must have one axis, got shape {ids.shape}")
        fixed = block.span_length(direction)
        if fixed is not None and len(ids) != fixed:
            raise CodesError(
                f"{modality}: a span holds {fixed} ids, got {len(ids)}; it was cut or is of another vocabulary"
            )
        order.num_frames(len(ids), block.num_quantizers)
        codebooks = order.codebooks(len(ids), block.num_quantizers)
        flat = ids - block.first_id - codebooks * block.codebook_size
        wrong = np.flatnonzero((flat < 0) | (flat >= block.codebook_size))
        if len(wrong):
            at = int(wrong[0])
            lo, hi = block.codebook_slice(int(codebooks[at]))
            raise CodesError(
                f"{modality}: id {int(ids[at])} at position {at} is outside [{lo}, {hi}) of codebook "
                f"{int(codebooks[at])}; decode with the grammar, which cannot write such an id"
            )
        return order.unflatten(flat, block.num_quantizers, block.grid)

    def split(self, ids: Any) -> list[Run]:
        """Cuts a sequence of ids int `[N]` into runs of text, single controls, and whole media spans.

        Raises:
            CodesError: a span without end, a code outside a span, or an unused id.
        """
        array = np.asarray(ids, dtype=np.int64)
        runs: list[Run] = []
        n = len(array)
        at = 0
        special = np.flatnonzero((array < 0) | (array >= self.text_size))
        cursor = 0
        while at < n:
            while cursor < len(special) and special[cursor] < at:
                cursor += 1
            stop = int(special[cursor]) if cursor < len(special) else n
            if stop > at:
                runs.append(Run("text", "text", at, stop))
                at = stop
                continue
            value = int(array[at])
            if value in self._control_names:
                runs.append(Run("control", self._control_names[value], at, at + 1))
                at += 1
                continue
            block = self.block_of_start(value)
            if block is None:
                raise CodesError(f"id {value} at position {at} is no text, control or start id; it is outside any span")
            ends = np.flatnonzero(array[at + 1 :] == block.end_id)
            if not len(ends):
                raise CodesError(f"{block.modality}: the span that starts at position {at} has no end")
            stop = at + 2 + int(ends[0])
            runs.append(Run("media", block.modality, at, stop))
            at = stop
        return runs

    # slices

    @cached_property
    def _slices(self) -> tuple[Int64, Int64, Int64]:
        lo, hi = [0], [self.open_size]
        class_of_id = np.full(self.size, -1, dtype=np.int64)
        class_of_id[: self.open_size] = 0
        for block in self.blocks:
            for codebook in range(block.num_quantizers):
                low, high = block.codebook_slice(codebook)
                low = block.end_id if codebook == 0 else low
                class_of_id[low:high] = len(lo)
                lo.append(low)
                hi.append(high)
        table = np.asarray(lo, dtype=np.int64), np.asarray(hi, dtype=np.int64), class_of_id
        for array in table:
            array.setflags(write=False)
        return table

    def slice_table(self) -> tuple[Int64, Int64, Int64]:
        """`(lo [C], hi [C], class_of_id [size])`: a label `y` competes with the ids `[lo[c], hi[c])`, `c =
        class_of_id[y]`.

        Class 0 is the open slice (text, controls, starts). Then, block by block, one class per codebook; that of
        codebook 0 also holds the block's end id. Unused ids at the end of the vocabulary have class -1 and are
        never labels.
        """
        return self._slices

    def slice_names(self) -> list[str]:
        """A name per slice class: "open", then "image", or "speech/0", "speech/1" for several codebooks."""
        names = ["open"]
        for block in self.blocks:
            many = block.num_quantizers > 1
            names += [f"{block.modality}/{k}" if many else block.modality for k in range(block.num_quantizers)]
        return names

    # manifest

    def to_dict(self) -> dict[str, Any]:
        """The JSON manifest; `from_dict` is its inverse."""
        blocks = []
        for block in self.blocks:
            entry = asdict(block)
            entry["grid"] = list(block.grid) if block.grid is not None else None
            blocks.append(entry)
        return {
            "format": FORMAT,
            "version": VERSION,
            "text_size": self.text_size,
            "text_fingerprint": self.text_fingerprint,
            "controls": dict(self.controls),
            "open_size": self.open_size,
            "size": self.size,
            "blocks": blocks,
        }

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON of the manifest."""
        return fingerprint_of(self.to_dict())

    @classmethod
    def from_dict(cls, manifest: Mapping[str, Any]) -> Vocabulary:
        """Reads a manifest.

        Raises `ManifestError` if it is not one, or its ids are not where the layout puts them.
        """
        if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
            raise ManifestError(
                f"not a vocabulary manifest of format {FORMAT!r} version {VERSION}: "
                f"format={manifest.get('format')!r}, version={manifest.get('version')!r}; update anyglot or "
                "rebuild the vocabulary"
            )
        try:
            specs = [spec_of(entry) for entry in manifest["blocks"]]
            built = cls.build(manifest["text_size"], *specs, text_fingerprint=manifest["text_fingerprint"])
        except (KeyError, TypeError) as error:
            raise ManifestError(
                f"broken vocabulary manifest ({error!r}); take it from the model folder again"
            ) from error
        expected = built.to_dict()
        for key, value in expected.items():
            if manifest.get(key) != value:
                raise ManifestError(
                    f"broken vocabulary manifest: {key} is {manifest.get(key)!r}, the layout gives "
                    f"{value!r}; it was edited by hand, take it from the model folder again"
                )
        return built

    def save(self, path: str | Path) -> None:
        """Writes the manifest, atomically."""
        manifest = {**self.to_dict(), "fingerprint": self.fingerprint}
        write_json(path, manifest)

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Reads a manifest file. Raises `ManifestError` if it is missing or broken."""
        manifest = read_json(path)
        try:
            vocabulary = cls.from_dict(manifest)
        except ManifestError as error:
            raise ManifestError(f"{path}: {error}") from error
        recorded = manifest.get("fingerprint", vocabulary.fingerprint)
        if recorded != vocabulary.fingerprint:
            raise ManifestError(
                f"{path}: the recorded fingerprint {recorded[:12]} is not that of its content; restore it"
            )
        return vocabulary

    def check_same(self, other: Vocabulary, mine: str = "this vocabulary", theirs: str = "the other") -> None:
        """Raises `FingerprintError` naming the first thing that differs, and the way out.

        `mine`/`theirs` name the files.
        """
        if self.fingerprint == other.fingerprint:
            return
        raise FingerprintError(f"{mine} and {theirs} differ: {self._difference(other)}")

    def _difference(self, other: Vocabulary) -> str:
        again = "prepare the data again with the model's own vocabulary"
        if self.text_size != other.text_size:
            sizes = f"{self.text_size} text ids against {other.text_size}"
            return f"{sizes}; use the same text tokenizer, or {again}"
        if self.text_fingerprint != other.text_fingerprint:
            return (
                f"text tokenizer {self.text_fingerprint[:12] or 'unknown'} against "
                f"{other.text_fingerprint[:12] or 'unknown'}; use the same text.model, or {again}"
            )
        if self.modalities != other.modalities:
            return f"modalities {list(self.modalities)} against {list(other.modalities)}; {again}"
        for a, b in zip(self.blocks, other.blocks, strict=True):
            if a.fingerprint != b.fingerprint:
                return (
                    f"block {a.modality!r} is of tokenizer {a.fingerprint[:12]} against "
                    f"{b.fingerprint[:12]}; encode the media with the same tokenizer, or {again}"
                )
            for name, value in asdict(a).items():
                if value != getattr(b, name):
                    return f"block {a.modality!r} has {name}={value} against {getattr(b, name)}; {again}"
        return f"sizes {self.size} against {other.size}; {again}"


def id_map(old: Vocabulary, new: Vocabulary) -> Int64:
    """Where the ids of `old` are in `new`, a vocabulary with the same text and all its blocks: int64 `[old.size]`.

    Text, controls, start, end and code ids are found by what they mean; ids that are unused in `old` give -1.

    Raises:
        FingerprintError: another text tokenizer, or a block that is missing or different.
    """
    if (old.text_size, old.text_fingerprint) != (new.text_size, new.text_fingerprint):
        raise FingerprintError(f"the vocabularies differ: {old._difference(new)}")
    places = np.full(old.size, -1, dtype=np.int64)
    places[: old.text_size] = np.arange(old.text_size)
    for name, value in old.controls.items():
        places[value] = new.controls[name]
    for block in old.blocks:
        if block.modality not in new.modalities:
            raise FingerprintError(
                f"the new vocabulary has no block {block.modality!r}; keep every old block and add the new ones"
            )
        found = new.block(block.modality)
        moved = replace(found, first_id=block.first_id, start_id=block.start_id, end_id=block.end_id)
        if moved != block:
            raise FingerprintError(
                f"block {block.modality!r} is not the same in both vocabularies; build the new one with the old "
                "block's tokenizer and settings (blocks.spec_of)"
            )
        places[block.start_id] = found.start_id
        places[block.end_id : block.stop_id] = np.arange(found.end_id, found.stop_id)
    return places
