"""Codes written as text, as other projects keep them in data and tokenizers: AnyGPT, SEED, Emu3.

    anygpt   <soim><👀8108>...<eoim>   <sosp><🗣️691>...<eosp>   <somu><🎶166><🎶3979>...<eomu> (codebook k from k * 2048)
    seed     <img><img_00042>...</img>
    emu3     <|image start|>2*3<|image token|><|visual token 000007|>...<|extra_200|>...<|extra_201|><|image end|>

`TokenStrings.write` and `.read` are inverses, `vocabulary_of` lays the same codes out as our ids, and `checkpoint_ids`
says which row of a checkpoint is which of our ids. Strings are parsed here and nowhere else: training sees ids. This
file reads no data files (`anyglot_recipes.importers.anygpt` does) and knows no text tokenizer.

Sources: github.com/OpenMOSS/AnyGPT (m_utils/anything2token.py, m_utils/prompter.py), github.com/AILab-CVC/SEED,
github.com/baaivision/Emu3 (processing_emu3.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from anyglot_lm.blocks import BlockSpec
from anyglot_lm.patterns import Int64
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import CodesError, ManifestError


@dataclass(frozen=True)
class SpanForm:
    """How one modality is spelled.

    Args:
        modality: name of the modality.
        start, end: the strings around a span.
        prefix, suffix: the strings around the number of a code.
        codebook_size: codes per codebook; codebook `k` is written from `k * codebook_size`.
        num_quantizers: codebooks, frame after frame.
        digits: numbers are padded with zeros to so many digits.
        grid: the grid where every span has the same, such as (32,).
        row_end: for images of any size: what ends a row. They open with `H*W` and `header_end`, and `footer` stands
            before `end`. Some writers leave the last `row_end` and the footer out; both ways are read.
        header_end, footer: see `row_end`.
        aliases: other spellings of `prefix` that are read, never written.
    """

    modality: str
    start: str
    end: str
    prefix: str
    suffix: str
    codebook_size: int
    num_quantizers: int = 1
    digits: int = 1
    grid: tuple[int, ...] | None = None
    row_end: str = ""
    header_end: str = ""
    footer: str = ""
    aliases: tuple[str, ...] = ()

    def token(self, number: int) -> str:
        """The string of one code; `number` counts through all codebooks."""
        return f"{self.prefix}{number:0{self.digits}d}{self.suffix}"

    @cached_property
    def token_pattern(self) -> re.Pattern[str]:
        """Matches one code; its only group is the number."""
        prefixes = "|".join(re.escape(prefix) for prefix in (self.prefix, *self.aliases))
        number = f"[0-9]{{{self.digits}}}|[1-9][0-9]{{{self.digits},8}}"
        return re.compile(f"(?:{prefixes})({number}){re.escape(self.suffix)}")

    @cached_property
    def _tokens_pattern(self) -> re.Pattern[str]:
        return re.compile(f"(?:{self.token_pattern.pattern})*")

    def write(self, codes: Any) -> str:
        """Codes int `[K', *grid]` -> the string of the span; the first `num_quantizers` of more are taken.

        Raises:
            CodesError: too few quantizers, a code outside its codebook, or a wrong grid.
        """
        array = np.asarray(codes)
        if array.ndim < 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
            raise CodesError(
                f"{self.modality}: codes must be a non-empty integer array [quantizers, *grid], got {array.dtype} of "
                f"shape {array.shape}"
            )
        array = array[: self.num_quantizers].astype(np.int64)
        self._check(array)
        numbers_KT = array.reshape(len(array), -1) + np.arange(len(array))[:, None] * self.codebook_size
        numbers = [f"{number:0{self.digits}d}" for number in numbers_KT.T.reshape(-1).tolist()]
        if not self.row_end:
            return f"{self.start}{self._join(numbers)}{self.end}"
        height, width = array.shape[1:]
        rows = (self._join(numbers[row * width : (row + 1) * width]) + self.row_end for row in range(height))
        return f"{self.start}{height}*{width}{self.header_end}{''.join(rows)}{self.footer}{self.end}"

    def _join(self, numbers: list[str]) -> str:
        return f"{self.prefix}{(self.suffix + self.prefix).join(numbers)}{self.suffix}"

    def read(self, inner: str) -> Int64:
        """What stands between start and end -> codes int64 `[K, *grid]`; inverse of `write`.

        Raises:
            CodesError: see `TokenStrings.read`.
        """
        grid = self.grid
        if self.row_end:
            inner, grid = self._read_rows(inner)
        matched = self._tokens_pattern.match(inner)
        at = matched.end() if matched is not None else 0
        if at < len(inner):
            raise CodesError(f"{self._what} holds {inner[at : at + 24]!r}, not codes such as {self.token(0)}")
        numbers = [int(number) for number in self.token_pattern.findall(inner)]
        if not numbers or len(numbers) % self.num_quantizers:
            raise CodesError(f"{self._what} holds {len(numbers)} codes, not frames of {self.num_quantizers}")
        flat_TK = np.asarray(numbers, dtype=np.int64).reshape(-1, self.num_quantizers)
        codes = np.ascontiguousarray((flat_TK - np.arange(self.num_quantizers) * self.codebook_size).T)
        if grid is not None and int(np.prod(grid)) == codes.shape[1]:
            codes = codes.reshape(self.num_quantizers, *grid)
        self._check(codes)
        return codes

    @property
    def _what(self) -> str:
        return f"a {self.modality} span {self.start}...{self.end}"

    def _read_rows(self, inner: str) -> tuple[str, tuple[int, int]]:
        """The codes alone, and the grid that the header states and the rows have."""
        header, mark, inner = inner.partition(self.header_end)
        size = re.fullmatch(r"([1-9][0-9]{0,4})\*([1-9][0-9]{0,4})", header)
        if not mark or size is None:
            raise CodesError(f"{self._what} opens with {header!r:.60}, not with HEIGHT*WIDTH{self.header_end}")
        grid = int(size[1]), int(size[2])
        rows = inner.removesuffix(self.footer).removesuffix(self.row_end).split(self.row_end)
        counts = [len(self.token_pattern.findall(row)) for row in rows]
        if counts != [grid[1]] * grid[0]:
            raise CodesError(f"{self._what} says {header} but has {len(rows)} rows of {counts!s:.40} codes")
        return "".join(rows), grid

    def _check(self, codes: Int64) -> None:
        if len(codes) != self.num_quantizers:
            raise CodesError(f"{self._what} needs {self.num_quantizers} quantizers, got {len(codes)}")
        wrong = np.argwhere((codes < 0) | (codes >= self.codebook_size))
        if len(wrong):
            low = int(wrong[0][0]) * self.codebook_size
            number = int(codes[tuple(wrong[0])]) + low
            raise CodesError(
                f"{self._what}: code {number} is outside [{low}, {low + self.codebook_size}), its codebook"
            )
        if self.grid is not None and codes.shape[1:] != self.grid:
            raise CodesError(f"{self._what} has the grid {self.grid}, got {codes.shape[1:]}")
        if self.row_end and codes.ndim != 3:
            raise CodesError(f"{self._what} needs codes [1, height, width], got {codes.shape}")


@dataclass(frozen=True)
class TokenStrings:
    """The strings of one project; see `TOKEN_STRINGS` for those that are known.

    `controls` names the project's strings for our controls, for `checkpoint_ids`.
    """

    name: str
    forms: tuple[SpanForm, ...]
    controls: Mapping[str, str] = field(default_factory=dict)

    def form(self, modality: str) -> SpanForm:
        """How a modality is spelled. Raises `ManifestError` if it is not."""
        for form in self.forms:
            if form.modality == modality:
                return form
        known = ", ".join(form.modality for form in self.forms)
        raise ManifestError(f"{self.name} token strings have no modality {modality!r}; they have: {known}")

    def write(self, modality: str, codes: Any) -> str:
        """`SpanForm.write` of the modality."""
        return self.form(modality).write(codes)

    def read(self, text: str) -> Iterator[str | tuple[str, Int64]]:
        """Pieces of `text` in order: strings, and `(modality, codes int64 [K, *grid])` for each span.

        Strings hold the text between spans exactly, white space included; empty ones are left out.

        Raises:
            CodesError: a span without start or end, something else inside it, a number outside its codebook, or a
                count that makes no whole frames or grid.
        """
        at = 0
        while match := self._markers.search(text, at):
            form = self._of_marker.get(match[0])
            if form is None:
                raise CodesError(f"{match[0]!r} at character {match.start()} is outside of any span")
            if match.start() > at:
                yield text[at : match.start()]
            stop = text.find(form.end, match.end())
            if stop < 0:
                raise CodesError(f"the {form.modality} span at character {match.start()} has no {form.end}")
            yield form.modality, form.read(text[match.end() : stop])
            at = stop + len(form.end)
        if at < len(text):
            yield text[at:]

    @cached_property
    def _of_marker(self) -> dict[str, SpanForm]:
        return {form.start: form for form in self.forms}

    @cached_property
    def _markers(self) -> re.Pattern[str]:
        """Starts, ends and single codes: all that may not stand in text."""
        parts = [re.escape(part) for form in self.forms for part in (form.start, form.end)]
        return re.compile("|".join(parts + [form.token_pattern.pattern for form in self.forms]))


_SEED_GRID = (32,)
ANYGPT = TokenStrings(
    "anygpt",
    (
        SpanForm("image", "<soim>", "<eoim>", "<\U0001f440", ">", 8192, grid=_SEED_GRID),
        SpanForm("speech", "<sosp>", "<eosp>", "<\U0001f5e3\ufe0f", ">", 1024, aliases=("<\U0001f5e3",)),
        SpanForm("music", "<somu>", "<eomu>", "<\U0001f3b6", ">", 2048, num_quantizers=4),
    ),
    {"bos": "<s>", "eos": "<eos>", "user": "[Human]", "assistant": "[MMGPT]"},
)
SEED = TokenStrings(
    "seed",
    (SpanForm("image", "<img>", "</img>", "<img_", ">", 8192, digits=5, grid=_SEED_GRID),),
    {"bos": "<s>", "eos": "</s>"},
)
EMU3 = TokenStrings(
    "emu3",
    (
        SpanForm(
            "image",
            "<|image start|>",
            "<|image end|>",
            "<|visual token ",
            "|>",
            32768,
            digits=6,
            row_end="<|extra_200|>",
            header_end="<|image token|>",
            footer="<|extra_201|>",
        ),
    ),
    {"bos": "<|extra_203|>", "eos": "<|extra_204|>", "pad": "<|endoftext|>"},
)
TOKEN_STRINGS: dict[str, TokenStrings] = {strings.name: strings for strings in (ANYGPT, SEED, EMU3)}


def token_strings(name: str) -> TokenStrings:
    """The strings of a project. Raises `ManifestError` for an unknown one."""
    if name not in TOKEN_STRINGS:
        raise ManifestError(f"unknown token strings {name!r}; use one of {', '.join(TOKEN_STRINGS)}")
    return TOKEN_STRINGS[name]


def vocabulary_of(
    name: str,
    text_size: int,
    *,
    text_fingerprint: str = "",
    fingerprints: Mapping[str, str] | None = None,
    grid: tuple[int, int] | None = None,
) -> Vocabulary:
    """A vocabulary with the blocks of a project, in the order of its `forms`.

    Args:
        name: `anygpt`, `seed` or `emu3`.
        text_size: ids of the text tokenizer (AnyGPT's own: 32,000).
        text_fingerprint: fingerprint of the text tokenizer, "" if unknown.
        fingerprints: modality -> fingerprint of the media tokenizer, where it is at hand; else `NAME/MODALITY`, which
            only fits itself.
        grid: the grid of Emu3's images, whose size a vocabulary has to fix.

    Raises:
        ManifestError: an unknown name, or a missing grid.
    """
    specs = []
    for form in token_strings(name).forms:
        if form.row_end and grid is None:
            raise ManifestError(f"{name} writes images of any size; say which one this data has, such as grid=(90, 90)")
        specs.append(
            BlockSpec(
                form.modality,
                (fingerprints or {}).get(form.modality, f"{name}/{form.modality}"),
                form.codebook_size,
                form.num_quantizers,
                pattern="raster" if form.row_end else "frame_major",
                grid=grid if form.row_end else form.grid,
            )
        )
    return Vocabulary.build(text_size, *specs, text_fingerprint=text_fingerprint)


def checkpoint_ids(name: str, vocabulary: Vocabulary, tokens: Mapping[str, int]) -> Int64:
    """For each of our ids, the id (row) it has in a checkpoint of the project: int64 `[vocabulary.size]`, -1 for none.

    `rows = weight[ids]` where `ids >= 0` then gives the embedding of our layout. Text ids keep their place.

    Args:
        name: `anygpt`, `seed` or `emu3`.
        vocabulary: of `vocabulary_of`, or any with blocks of the same modalities and sizes.
        tokens: token string -> id, such as the tokenizer's `get_vocab()`.

    Raises:
        ManifestError: a block that is not the project's, or a code, start or end string that `tokens` lacks.
    """
    strings = token_strings(name)
    found = np.full(vocabulary.size, -1, dtype=np.int64)
    found[: vocabulary.text_size] = np.arange(vocabulary.text_size)
    for control, token in strings.controls.items():
        found[vocabulary.controls[control]] = tokens.get(token, -1)

    def id_of(token: str) -> int:
        if token not in tokens:
            raise ManifestError(f"the checkpoint's tokenizer lacks {token!r}; is it one of {name}?")
        return tokens[token]

    for block in vocabulary.blocks:
        form = strings.form(block.modality)
        check_block(strings, vocabulary, block.modality)
        count = block.num_quantizers * block.codebook_size
        found[block.first_id : block.stop_id] = [id_of(form.token(number)) for number in range(count)]
        found[block.start_id] = id_of(form.start)
        found[block.end_id] = id_of(form.end)
    return found


def check_block(strings: TokenStrings, vocabulary: Vocabulary, modality: str) -> None:
    """Raises `ManifestError` if the vocabulary's block of `modality` cannot hold the codes that `strings` spells."""
    form, block = strings.form(modality), vocabulary.block(modality)
    mine, theirs = (block.num_quantizers, block.codebook_size), (form.num_quantizers, form.codebook_size)
    if mine != theirs:
        raise ManifestError(
            f"the vocabulary's {modality} block has {mine[0]} x {mine[1]} codes, {strings.name} {theirs[0]} x "
            f"{theirs[1]}; use a model made for these codes (vocabulary_of), or a plain language model with none yet"
        )
