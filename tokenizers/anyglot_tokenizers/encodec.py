"""`Encodec`: EnCodec at 24, 32 and 48 kHz (Defossez et al., arXiv 2210.13438), from folders as transformers writes.

The network is our own compact form of the same graph (`seanet.py`): convolutions, an LSTM, more convolutions. It only
runs; nothing here trains, and transformers is not needed.

How audio of any length is coded exactly in bounded memory: convolutions see a few frames of context on each side of a
window, which are then cropped; the LSTM carries its state from window to window. So alone, padded in a batch, in
chunks and as a stream all come to the same codes. Convolutions see the items of a batch one by one, without padding;
the LSTM, which is slow because of its steps and not of its width, sees them together. The 48 kHz model normalises over
segments of one second and codes each by itself.

Shapes: B items, T steps of a layer, O outputs of a layer, N frames (codes), M frames of all items, K codebooks,
E entries, D latent dims, S samples, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.bounds import bounded_by
from anyglot_tokenizers.checks import check_audio, check_count
from anyglot_tokenizers.chunks import Stream
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.errors import CheckpointError, CodesError, UnsupportedError
from anyglot_tokenizers.published import PublishedTokenizer, read_safetensors
from anyglot_tokenizers.seanet import Conv, Convs, Decoder, Encoder, Layer, Recurrent, Shape, State, Weights
from anyglot_tokenizers.tokenizer import CONFIG_FILE, full_precision, seeded

WINDOW = 150  # frames that the convolutions see at a time
ROUND = 2**21  # numbers between convolutions and LSTM at a time, over the items; bounds the memory
GROUP = 64  # items (of similar length) that the LSTM sees together
SEGMENTS = 16  # segments at a time (48 kHz)
LOUDNESS = 0.1  # of decoded segments that come without their scale (48 kHz): -20 dB, as quiet music is
MAX_PARAMETERS = 2**30


@dataclass
class Carry:
    """What items that are coded together carry from one round of frames to the next.

    Attributes:
        frame: frames that the LSTM has seen.
        lstm: its state.
        tail_BTO: its outputs for the last frames before `frame`.
    """

    frame: int = 0
    lstm: State | None = None
    tail_BTO: Tensor | None = None

    def shrink(self, batch: int) -> None:
        """Forget all but the first items."""
        if self.lstm is not None and self.tail_BTO is not None:
            hidden, cell = self.lstm
            self.lstm = hidden[:, :batch], cell[:, :batch]
            self.tail_BTO = self.tail_BTO[:batch]

    def advance(self, h_TBO: Tensor, recurrent: Recurrent, keep: int) -> tuple[int, Tensor]:
        """Send further frames through the LSTM; its outputs from up to `keep` frames before on, and which is first."""
        y_BTO = h_TBO.transpose(0, 1)
        if len(h_TBO):
            y_TBO, self.lstm = recurrent(h_TBO, self.lstm)
            y_BTO = y_TBO.transpose(0, 1)
        if self.tail_BTO is not None:
            y_BTO = torch.cat([self.tail_BTO, y_BTO], 1)
        self.frame += len(h_TBO)
        self.tail_BTO = y_BTO[:, max(y_BTO.shape[1] - keep, 0) :].clone()
        return self.frame - y_BTO.shape[1], y_BTO


class Encodec(PublishedTokenizer):
    """Audio float32 `[B, C, samples]` to codes int64 `[B, K, N]` and back.

    Codes of 24 and 32 kHz: `N = ceil(samples / hop)`. At 48 kHz segments of 1 s start every 0.99 s and their codes
    follow one another, 150 each and fewer for the last; `Codes.extras["scale"]`, `[B, segments]`, holds the loudness
    of each, without which `decode` makes all equally loud.

    Args:
        model: content of config.json of transformers' `EncodecModel`.
        license: of the weights.
        seed: of the random weights that the model has until others are loaded.
    """

    def __init__(self, *, model: Mapping[str, Any], license: str = "unknown", seed: int = 0) -> None:
        shape = Shape.read(model)
        super().__init__({"model": asdict(shape), "license": license, "seed": seed})
        self.shape = shape
        self.modality = "music" if shape.audio_channels > 1 or shape.sampling_rate >= 32000 else "speech"
        with torch.device("meta"):
            self.encoder, self.decoder, self.quantizer = Encoder(shape), Decoder(shape), Codebooks(shape)
        if (count := sum(parameter.numel() for parameter in self.parameters())) > MAX_PARAMETERS:
            raise ValueError(f"the config asks for {count} parameters, more than {MAX_PARAMETERS}")
        self.to_empty(device=torch.empty(0).device).requires_grad_(False)
        with seeded(seed):
            for name, parameter in self.named_parameters():
                inputs = parameter.shape[1:].numel() if name.endswith("weight") else parameter.shape[-2:].numel() // 4
                parameter.normal_(std=0.02 if parameter.ndim == 1 else inputs**-0.5)
                if name.endswith("scale"):
                    parameter.fill_(1.0)
            for index, book_ED in enumerate(self.quantizer.embed_KED):
                book_ED.normal_(std=0.3 * 0.9**index)

    @classmethod
    def from_published(cls, folder: Path, entries: dict[str, Any], *, license: str) -> Self:
        """Read config.json and safetensors of transformers' `EncodecModel` (see `PublishedTokenizer`)."""
        tensors = read_safetensors(folder)
        try:
            with bounded_by(tensors, folder):
                tokenizer = cls(model=entries, license=license)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{folder / CONFIG_FILE}: not a config of an EnCodec model ({error})") from error
        tokenizer.read_tensors(tensors, str(folder))
        return tokenizer.eval()

    def read_tensors(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Take weights by the names transformers gives them, weight norm folded or not.

        Raises CheckpointError, naming `origin`, for missing, left over, misshapen or non-finite tensors.
        """
        weights = Weights(tensors, origin)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, Layer | Recurrent | Codebooks):
                    module.read(weights)
        if weights.rest:
            raise CheckpointError(f"{origin}: weights that the config has no place for: {sorted(weights.rest)[:3]}")
        self._fingerprint = None

    def _spec_entries(self) -> dict[str, Any]:
        return {
            "modality": self.modality,
            "codebook_sizes": (self.shape.codebook_size,) * self.shape.num_quantizers,
            "axes": ("time",),
            "strides": (self.shape.hop,),
            "sample_rate": self.shape.sampling_rate,
            "channels": self.shape.audio_channels,
            "causal": self.shape.use_causal_conv,
            "context": None,
            "extras": ("scale",) if self.shape.segment else (),
            "license": self.config["license"],
        }

    def num_codes(self, samples: int) -> int:
        """N for so many samples; at 48 kHz about one in a hundred more than `spec.num_codes` says."""
        if not self.shape.segment:
            return -(-samples // self.shape.hop)
        return sum(-(-size // self.shape.hop) for size in self._segments(samples))

    def stream(self, batch_size: int = 1, *, num_quantizers: int | None = None) -> EncodecStream:
        """A stream that carries the LSTM's state. Raises UnsupportedError at 48 kHz."""
        return EncodecStream(self, batch_size, num_quantizers=num_quantizers)

    @torch.no_grad()
    def encode(self, media: Tensor, lengths: Tensor | None = None, *, num_quantizers: int | None = None) -> Codes:
        """Codes of audio of any length, in bounded memory; `lengths` int64 `[B]` samples per item, None = all.

        Raises MediaError for empty, non-finite or misshapen audio, CodesError for num_quantizers outside 1..K.
        """
        media_BCS, lengths_B = check_audio(media, lengths, self.shape.audio_channels)
        media_BCS, lengths_B = media_BCS.to(self.device), lengths_B.to(self.device)
        used = check_count(num_quantizers, self.shape.num_quantizers)
        counts = [self.num_codes(length) for length in lengths_B.tolist()]
        codes_BKN = torch.zeros(len(counts), used, max(counts), dtype=torch.int64, device=self.device)
        extras: dict[str, Tensor] = {}
        with full_precision(self.device):
            if self.shape.segment:
                extras["scale"] = self._encode_segments(media_BCS, lengths_B, codes_BKN)
            else:
                for items_B, end, state in self._rounds(counts, self.encoder.width):
                    start, ids_BKN = self.encode_step(state, media_BCS, items_B, lengths_B, 0, end, used)
                    codes_BKN[items_B, :, start:end] = ids_BKN
                for row, count in enumerate(counts):
                    codes_BKN[row, :, count:] = 0
        return Codes(codes_BKN, torch.tensor(counts, device=self.device), self.spec, extras)

    @torch.no_grad()
    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Audio float32 `[B, C, samples]`, silent beyond an item's end, of codes `[B, k, N]`, any k <= K.

        `samples` is N * hop; at 48 kHz 47,520 for each segment but the last. Not clamped, as published.
        """
        codes_BKN, lengths_B = self._unpack(codes)
        batch, _, total = codes_BKN.shape
        counts, hop = lengths_B.tolist(), self.shape.hop
        with full_precision(self.device):
            if self.shape.segment:
                return self._decode_segments(codes_BKN, counts, codes.extras if isinstance(codes, Codes) else {})
            counts_B = torch.tensor(counts, device=self.device)
            audio_BCS = torch.zeros(batch, self.shape.audio_channels, total * hop, device=self.device)
            for items_B, end, state in self._rounds(counts, self.decoder.width):
                start, x_BCS = self.decode_step(state, codes_BKN, items_B, counts_B, 0, end)
                audio_BCS[items_B, :, start * hop : end * hop] = x_BCS
            for row, count in enumerate(counts):
                audio_BCS[row, :, count * hop :] = 0
        return audio_BCS

    def _rounds(self, counts: list[int], width: int) -> Iterator[tuple[Tensor, int, Carry]]:
        """Items of similar length that go on (longest first), up to which frame, and what they carry; until all end."""
        order = sorted(range(len(counts)), key=lambda item: -counts[item])
        for group in (order[first : first + GROUP] for first in range(0, len(order), GROUP)):
            carry = Carry()
            while items := [item for item in group if counts[item] > carry.frame]:
                carry.shrink(len(items))
                frames = max(ROUND // (width * len(items) * WINDOW), 1) * WINDOW
                yield torch.tensor(items, device=self.device), min(carry.frame + frames, counts[items[0]]), carry

    def encode_step(
        self, carry: Carry, audio_BCS: Tensor, items_B: Tensor, lengths_B: Tensor, offset: int, end: int, used: int
    ) -> tuple[int, Tensor]:
        """Codes `[items, used, n]` of frames up to `end`, and the number of the first.

        The first are those that the round before could only guess, for lack of what comes after them.

        Args:
            carry: of these items; advanced.
            audio_BCS: audio of all items from frame `offset` on.
            items_B: which to encode, longest first.
            lengths_B: samples in `audio_BCS` of all items.
            offset: number of the frame at which `audio_BCS` begins.
            end: frame to go to.
            used: quantizers to use.
        """
        encoder, hop, begin = self.encoder, self.shape.hop, carry.frame
        before, after = encoder.front.reach
        lengths_B = lengths_B[items_B]
        counts_B = -(-lengths_B // hop) + offset
        h_TBO = audio_BCS.new_zeros(end - begin, len(items_B), encoder.width)
        for start, stop, rows in self._windows(begin, end, counts_B):
            low = max(start - before, offset) - offset
            x_BCS = audio_BCS[:, :, low * hop : (stop + after - offset) * hop][items_B[rows]]
            y_BTO = fitted(encoder.front, x_BCS.transpose(1, 2), lengths_B[rows] - low * hop)
            y_BTO = y_BTO[:, start - offset - low : stop - offset - low]
            h_TBO[start - begin : start - begin + y_BTO.shape[1], rows] = y_BTO.transpose(0, 1)
        over_TB1 = (torch.arange(begin, end, device=h_TBO.device)[:, None] >= counts_B)[..., None]
        # on zeros an LSTM fades into denormal numbers, which are slow
        h_TBO = torch.where(over_TB1, h_TBO[:, :1], h_TBO)
        first, y_BTO = carry.advance(h_TBO, encoder.recurrent, encoder.last.left + encoder.last.right)
        from_frame = max(begin - encoder.last.right, 0)
        ids_BKN = torch.zeros(len(items_B), used, end - from_frame, dtype=torch.int64, device=self.device)
        for start, stop, rows in self._windows(from_frame, end, counts_B):
            low = max(start - encoder.last.left, first)
            z_BND = fitted(
                encoder.last, y_BTO[rows, low - first : stop + encoder.last.right - first], counts_B[rows] - low
            )
            found_BKN = self.quantizer.encode(z_BND[:, start - low : stop - low], used)
            ids_BKN[rows, :, start - from_frame : start - from_frame + found_BKN.shape[2]] = found_BKN
        return from_frame, ids_BKN

    def decode_step(
        self, carry: Carry, codes_BKN: Tensor, items_B: Tensor, counts_B: Tensor, offset: int, end: int
    ) -> tuple[int, Tensor]:
        """Audio `[items, C, n * hop]` of frames up to `end`, and the number of the first; see `encode_step`.

        Args:
            carry: of these items; advanced.
            codes_BKN: codes of all items from frame `offset` on.
            items_B: which to decode, longest first.
            counts_B: frames in `codes_BKN` of all items.
            offset: number of the frame at which `codes_BKN` begins.
            end: frame to go to.
        """
        decoder, hop, begin = self.decoder, self.shape.hop, carry.frame
        before, after = decoder.back.reach
        counts_B = counts_B[items_B] + offset
        low = max(begin - decoder.first.left, offset)
        z_BND = self.quantizer.decode(codes_BKN[:, :, low - offset : end + decoder.first.right - offset][items_B])
        h_BTO = fitted(decoder.first, z_BND, counts_B - low)[:, begin - low : end - low]
        first, y_BTO = carry.advance(h_BTO.transpose(0, 1).contiguous(), decoder.recurrent, before + after)
        from_frame = max(begin - after, 0)
        audio_BCS = y_BTO.new_zeros(len(items_B), self.shape.audio_channels, (end - from_frame) * hop)
        for start, stop, rows in self._windows(from_frame, end, counts_B):
            low = max(start - before, first)
            x_BSC = fitted(decoder.back, y_BTO[rows, low - first : stop + after - first], counts_B[rows] - low)
            x_BSC = x_BSC[:, (start - low) * hop : (stop - low) * hop]
            into = (start - from_frame) * hop
            audio_BCS[rows, :, into : into + x_BSC.shape[1]] = x_BSC.transpose(1, 2)
        return from_frame, audio_BCS

    def _windows(self, begin: int, end: int, counts_B: Tensor) -> Iterator[tuple[int, int, slice]]:
        """Windows of frames, and the rows (sorted by length) that the convolutions see together in each."""
        counts = counts_B.tolist()
        for start in [begin, *range((begin // WINDOW + 1) * WINDOW, end, WINDOW)]:
            active = sum(count > start for count in counts)
            together = 1 if self.device.type == "cpu" else max(active, 1)  # on a CPU, what fits the caches is fastest
            for row in range(0, active, together):
                yield start, min((start // WINDOW + 1) * WINDOW, end), slice(row, row + together)

    def _segments(self, samples: int) -> list[int]:
        """Sizes of the segments of an item, in samples. All but the last reach into their last frame: where the item
        ends before, silence follows.
        """
        least = (self.shape.segment_frames - 1) * self.shape.hop + 1
        sizes = [min(self.shape.segment, samples - start) for start in range(0, samples, self.shape.advance)]
        return [*(max(size, least) for size in sizes[:-1]), *sizes[-1:]]

    def _encode_segments(self, media_BCS: Tensor, lengths_B: Tensor, codes_BKN: Tensor) -> Tensor:
        """Fill in the codes; returns the loudness of the segments, `[B, segments]`, 0 beyond an item's end."""
        encoder = self.encoder
        places: dict[int, list[tuple[int, int]]] = {}  # by size: item and number of the segment
        for item, length in enumerate(lengths_B.tolist()):
            for number, size in enumerate(self._segments(length)):
                places.setdefault(size, []).append((item, number))
        most = 1 + max(number for group in places.values() for _, number in group)
        scale_BS = media_BCS.new_zeros(len(media_BCS), most)
        for size, group in places.items():
            for first in range(0, len(group), SEGMENTS):
                some = group[first : first + SEGMENTS]
                pieces = []
                for item, number in some:
                    at = number * self.shape.advance
                    piece_CS = media_BCS[item, :, at : min(at + size, int(lengths_B[item]))]
                    pieces.append(F.pad(piece_CS, (0, size - piece_CS.shape[1])))
                x_BSC = torch.stack(pieces).transpose(1, 2)
                scale_B = x_BSC.mean(2).square().mean(1).sqrt() + 1e-8
                x_BSC = x_BSC / scale_B[:, None, None]
                h_BTO = torch.cat([encoder.front(x_SC[None]) for x_SC in x_BSC])
                y_TBO, _ = encoder.recurrent(h_BTO.transpose(0, 1).contiguous(), None)
                ids_BKN = self.quantizer.encode(encoder.last(y_TBO.transpose(0, 1)), codes_BKN.shape[1])
                for row, (item, number) in enumerate(some):
                    scale_BS[item, number] = scale_B[row]
                    at = number * self.shape.segment_frames
                    codes_BKN[item, :, at : at + ids_BKN.shape[2]] = ids_BKN[row]
        return scale_BS

    def _decode_segments(self, codes_BKN: Tensor, counts: list[int], extras: Mapping[str, Tensor]) -> Tensor:
        """Decode each segment, make it as loud as it was, and fade one over into the next (a triangle as weight)."""
        decoder, hop, frames = self.decoder, self.shape.hop, self.shape.segment_frames
        total = codes_BKN.shape[2]
        most = -(-total // frames)
        scale_BS = extras.get("scale", torch.full((len(counts), most), LOUDNESS)).to(self.device)
        fits = scale_BS.is_floating_point() and scale_BS.ndim == 2 and scale_BS.shape[1] >= most
        if not fits or not bool(torch.isfinite(scale_BS).all()):
            raise CodesError(f"extra 'scale' is {list(scale_BS.shape)}, need finite numbers [batch, {most} segments]")
        places: dict[int, list[tuple[int, int]]] = {}  # by number of codes: item and number of the segment
        for item, count in enumerate(counts):
            for number in range(-(-count // frames)):
                places.setdefault(min(frames, count - number * frames), []).append((item, number))
        ends = [number * self.shape.advance + min(frames, total - number * frames) * hop for number in range(most)]
        samples = max(ends)
        audio_BCS = torch.zeros(len(counts), self.shape.audio_channels, samples, device=self.device)
        weights_BS = audio_BCS.new_zeros(len(counts), samples)
        ramp_S = torch.linspace(0, 1, frames * hop + 2, device=self.device)[1:-1]
        triangle_S = 0.5 - (ramp_S - 0.5).abs()
        for size, group in places.items():
            for begin in range(0, len(group), SEGMENTS):
                some = group[begin : begin + SEGMENTS]
                ids = [codes_BKN[item, :, number * frames : number * frames + size] for item, number in some]
                h_BTO = decoder.first(self.quantizer.decode(torch.stack(ids)))
                y_TBO, _ = decoder.recurrent(h_BTO.transpose(0, 1).contiguous(), None)
                for row, (item, number) in enumerate(some):
                    x_SC = decoder.back(y_TBO[:, row][None])[0] * scale_BS[item, number]
                    into = slice(number * self.shape.advance, number * self.shape.advance + size * hop)
                    audio_BCS[item, :, into] += (x_SC * triangle_S[: size * hop, None]).T
                    weights_BS[item, into] += triangle_S[: size * hop]
        return audio_BCS / weights_BS.clamp(min=1e-9)[:, None]


class Codebooks(nn.Module):
    """Residual vector quantizer to use, not to train: K codebooks, each for what the ones before it left over."""

    def __init__(self, config: Shape) -> None:
        super().__init__()
        self.embed_KED = nn.Parameter(torch.empty(config.num_quantizers, config.codebook_size, config.hidden_size))
        self._norms: tuple[tuple[int, int], Tensor] | None = None

    def read(self, weights: Weights) -> None:
        """Take the entries; the statistics of training are left out."""
        for index, embed_ED in enumerate(self.embed_KED):
            name = f"quantizer.layers.{index}.codebook"
            embed_ED.copy_(weights.take(f"{name}.embed", *embed_ED.shape))
            for statistic in ("inited", "cluster_size", "embed_avg"):
                weights.rest.pop(f"{name}.{statistic}", None)

    def _half_norms(self) -> Tensor:
        """|e|^2 / 2 of all entries, `[K, E]`, computed again only when the entries have changed."""
        if self.embed_KED.is_inference():  # has no version
            return self.embed_KED.square().sum(2) / 2
        version = self.embed_KED.data_ptr(), self.embed_KED._version
        if self._norms is None or self._norms[0] != version:
            self._norms = version, self.embed_KED.square().sum(2) / 2
        return self._norms[1]

    def train(self, mode: bool = True) -> Self:
        """Switch mode as usual; also forgets what is kept of the entries."""
        self._norms = None
        return super().train(mode)

    def encode(self, z_BND: Tensor, count: int) -> Tensor:
        """Nearest entries of the first `count` codebooks, int64 `[B, count, N]`: argmin |e|^2 / 2 - z.e."""
        rest_MD = z_BND.flatten(0, 1).clone()
        ids = []
        for embed_ED, half_E in zip(self.embed_KED[:count], self._half_norms(), strict=False):
            ids.append(torch.addmm(half_E, rest_MD, embed_ED.T, alpha=-1).argmin(1))
            rest_MD.sub_(F.embedding(ids[-1], embed_ED))
        return torch.stack(ids).view(count, *z_BND.shape[:2]).transpose(0, 1)

    def decode(self, codes_BKN: Tensor) -> Tensor:
        """Sum of the entries, `[B, N, D]`."""
        total_BND = F.embedding(codes_BKN[:, 0], self.embed_KED[0])
        for index in range(1, codes_BKN.shape[1]):
            total_BND += F.embedding(codes_BKN[:, index], self.embed_KED[index])
        return total_BND


class EncodecStream(Stream):
    """`Stream` of an `Encodec` that carries the LSTM's state; for the causal model without lag beyond a hop.

    Raises:
        UnsupportedError: the model codes segments by themselves (48 kHz).
    """

    tokenizer: Encodec

    def __init__(self, tokenizer: Encodec, batch_size: int = 1, *, num_quantizers: int | None = None) -> None:
        if tokenizer.shape.segment:
            raise UnsupportedError("EnCodec at 48 kHz codes whole segments of 1 s; encode does so in bounded memory")
        encoder, decoder = tokenizer.encoder, tokenizer.decoder
        right = max(encoder.front.reach[1] + encoder.last.right, decoder.first.right + decoder.back.reach[1])
        super().__init__(tokenizer, batch_size, num_quantizers=num_quantizers, context=(0, right))
        self.head = {  # frames that must be there before the first is certain: padding mirrors them
            "encode": max(encoder.front.reach[0], encoder.last.left) + 1,
            "decode": max(decoder.first.left, decoder.back.reach[0]) + 1,
        }
        self.carry = Carry()
        self.items_B = torch.arange(batch_size, device=tokenizer.device)

    @torch.no_grad()
    def _encode(self, until: int) -> Codes:
        encoder = self.tokenizer.encoder
        assert self.buffer is not None
        end = until if self.way == "ended" else until + encoder.last.right
        if until == self.done or (self.way != "ended" and end < self.head["encode"]):
            return self._no_codes()
        lengths_B = torch.full((self.batch_size,), self.buffer.shape[2], device=self.buffer.device)
        with full_precision(self.buffer.device):
            start, ids_BKN = self.tokenizer.encode_step(
                self.carry, self.buffer, self.items_B, lengths_B, self.start, end, self.num_quantizers
            )
        ids_BKN = ids_BKN[:, :, self.done - start : until - start]
        self._forget(until, encoder.front.reach[0], self.spec.hop_length)
        return Codes(ids_BKN, None, self.spec)

    @torch.no_grad()
    def _decode(self, until: int) -> Tensor:
        decoder, hop = self.tokenizer.decoder, self.spec.hop_length
        assert self.buffer is not None
        end = until if self.way == "ended" else until + decoder.back.reach[1]
        if until == self.done or (self.way != "ended" and end < self.head["decode"]):
            return self._no_audio()
        counts_B = torch.full((self.batch_size,), self.buffer.shape[2], device=self.buffer.device)
        with full_precision(self.buffer.device):
            start, audio_BCS = self.tokenizer.decode_step(
                self.carry, self.buffer, self.items_B, counts_B, self.start, end
            )
        audio_BCS = audio_BCS[:, :, (self.done - start) * hop : (until - start) * hop]
        self._forget(until, decoder.first.left, 1)
        return audio_BCS

    def _forget(self, until: int, before: int, size: int) -> None:
        """Drop the input that no later frame can depend on; `size` is its length per frame."""
        assert self.buffer is not None
        self.done = until
        drop = max(self.carry.frame - before - self.start, 0)
        self.buffer = self.buffer[:, :, drop * size :].clone() if drop else self.buffer
        self.start += drop


def fitted(part: Conv | Convs, x_BTO: Tensor, lengths_B: Tensor) -> Tensor:
    """Run convolutions over a window of items of which so many rows are left, which may be more than the window."""
    if len(x_BTO) == 1:
        y_BTO: Tensor = part(x_BTO[:, : int(lengths_B)])
        return y_BTO
    y_BTO = part(x_BTO, lengths_B.clamp(max=x_BTO.shape[1]))
    return y_BTO
