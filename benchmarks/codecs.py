"""Published codecs: ours against transformers (and other packages), same random weights at the real sizes.

Eight clips of 1 to 15 seconds are encoded and decoded. The peer gets them one by one and in one padded batch, and the
faster way counts. Codes are compared first, clip by clip. `--hour` instead encodes one hour of audio in one call and
reports the peak memory of the process.

A codec is one function that returns a `Case`; add it to `CASES`.

    python benchmarks/codecs.py [encodec_24khz ...] [--quick] [--runs 5] [--compiled] [--hour] [--threads 2]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor

from anyglot_tokenizers import Codes, LicenseWarning
from anyglot_tokenizers.tokenizer import Tokenizer

WARM = 20.0  # seconds after which nothing is left to warm up


@dataclass
class Peer:
    """Another implementation of a codec, with the same weights.

    Attributes:
        name: shown in the table.
        encode: audio `[B, C, samples]` and mask `[B, samples]` (None = no padding) to codes `[B, K, N]`.
        decode: codes `[B, K, N]` to audio.
        bar: ratio that ours must reach.
        batches: whether it takes a padded batch.
    """

    name: str
    encode: Callable[[Tensor, Tensor | None], Tensor]
    decode: Callable[[Tensor], Tensor]
    bar: float
    batches: bool = True


@dataclass
class Case:
    """A codec: ours in one or more ways (the first counts; a compiled one may follow) and its peers."""

    ours: dict[str, Tokenizer]
    peers: list[Peer]
    num_quantizers: int
    notes: list[str] = field(default_factory=list)


def fill_codebooks(codebooks: list[Tensor], latents_ND: Tensor) -> None:
    """Random weights with lively codes: entries are what is left of random latents, slightly moved."""
    generator = torch.Generator().manual_seed(1)
    rest_ND = latents_ND.clone()
    for book_CD in codebooks:
        rows = torch.randint(len(rest_ND), (len(book_CD),), generator=generator)
        book_CD.copy_(rest_ND[rows] + 0.3 * rest_ND.std() * torch.randn(book_CD.shape, generator=generator))
        rest_ND = rest_ND - book_CD[torch.cdist(rest_ND, book_CD).argmin(1)]


def encodec_24khz() -> Case:
    """EnCodec 24 kHz at 6 kbit/s (8 of 32 codebooks), against transformers and the `encodec` package."""
    from anyglot_tokenizers.encodec import Encodec
    from anyglot_tokenizers.encodec_package import import_encodec

    torch.manual_seed(0)
    theirs = transformers.EncodecModel(transformers.EncodecConfig()).eval()
    books = [layer.codebook.embed for layer in theirs.quantizer.layers]
    fill_codebooks(books, theirs.encoder(0.1 * torch.randn(1, 1, 24000 * 10))[0].T)
    ours = Encodec(model=theirs.config.to_dict()).eval()
    ours.read_tensors(theirs.state_dict(), "transformers")

    def encode(audio: Tensor, mask: Tensor | None) -> Tensor:
        return theirs.encode(audio, mask, bandwidth=6.0).audio_codes[0]

    def decode(codes: Tensor) -> Tensor:
        return theirs.decode(codes[None], [None]).audio_values

    peers = [Peer("transformers", encode, decode, bar=1.3)]
    notes = []
    if importlib.util.find_spec("encodec") is None:
        notes.append("encodec package: skipped, not installed (pip install --no-deps encodec)")
    else:
        package = import_encodec().EncodecModel.encodec_model_24khz(pretrained=False)
        package.load_state_dict(package_names(theirs.state_dict()))
        package.set_target_bandwidth(6.0)
        peers.append(
            Peer(
                "encodec package",
                lambda audio, mask: package.encode(audio)[0][0],
                lambda codes: package.decode([(codes, None)]),
                bar=3.0,
            )
        )
    return Case({"ours": ours}, peers, num_quantizers=8, notes=notes)


def package_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that the `encodec` package gives to what transformers' EncodecModel holds."""
    renamed = {}
    for name, tensor in tensors.items():
        name = re.sub(r"decoder\.layers\.(3|6|9|12)\.conv\.", r"decoder.model.\1.convtr.convtr.", name)
        name = name.replace("coder.layers.", "coder.model.").replace(".conv.", ".conv.conv.")
        name = name.replace("quantizer.layers.", "quantizer.vq.layers.").replace(".codebook.", "._codebook.")
        name = name.replace("parametrizations.weight.original0", "weight_g")
        renamed[name.replace("parametrizations.weight.original1", "weight_v")] = tensor
    return renamed


def dac_24khz() -> Case:
    """DAC 24 kHz at 6 kbit/s (8 of 32 codebooks), against transformers."""
    from anyglot_tokenizers.dac import Dac

    torch.manual_seed(0)
    config = transformers.DacConfig(downsampling_ratios=[2, 4, 5, 8], n_codebooks=32, sampling_rate=24000)
    theirs = transformers.DacModel(config).eval()
    for weights in (weights for weights in theirs.parameters() if weights.ndim == 3 and weights.shape[0] > 1):
        torch.nn.init.kaiming_normal_(weights, nonlinearity="linear").mul_(0.5)

    def encode(audio: Tensor, mask: Tensor | None) -> Tensor:
        return theirs.encode(whole_hops(audio, 320), 8).audio_codes

    def decode(codes: Tensor) -> Tensor:  # theirs stops 8 samples short of a whole hop
        return whole_hops(theirs.decode(audio_codes=codes).audio_values, 320)

    return Case(published(Dac, theirs, ("encoder", "decoder")), [Peer("transformers", encode, decode, bar=1.6)], 8)


def mimi() -> Case:
    """Mimi at 1.1 kbit/s (8 of 32 codebooks), against transformers."""
    from anyglot_tokenizers.mimi import Mimi

    torch.manual_seed(0)
    theirs = transformers.MimiModel(transformers.MimiConfig()).eval()
    latents_BCN = theirs.encoder(0.1 * torch.randn(1, 1, 24000 * 60)).latents
    for half in (
        theirs.quantizer.semantic_residual_vector_quantizer,
        theirs.quantizer.acoustic_residual_vector_quantizer,
    ):
        fill_codebooks([layer.codebook.embed_sum for layer in half.layers], half.input_proj(latents_BCN)[0].T)

    def encode(audio: Tensor, mask: Tensor | None) -> Tensor:
        return theirs.encode(whole_hops(audio, 1920), num_quantizers=8).audio_codes

    def decode(codes: Tensor) -> Tensor:
        return theirs.decode(codes).audio_values

    peer = Peer("transformers", encode, decode, bar=1.2)
    return Case(published(Mimi, theirs, ("encoder", "decoder")), [peer], 8)


def published(kind: type[Tokenizer], model: transformers.PreTrainedModel, parts: Sequence[str]) -> dict[str, Tokenizer]:
    """Our tokenizer of a model's weights, plain and with these parts compiled."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", LicenseWarning)
        model.save_pretrained(folder)
        ours = {label: kind.from_pretrained(folder) for label in ("ours", "ours compiled")}
    for part in parts:
        getattr(ours["ours compiled"], part).compile(dynamic=True)
    return ours


def whole_hops(audio: Tensor, hop: int) -> Tensor:
    """Padded with silence to whole hops, as transformers' feature extractors do."""
    return torch.nn.functional.pad(audio, (0, -audio.shape[-1] % hop))


CASES: dict[str, Callable[[], Case]] = {"encodec_24khz": encodec_24khz, "dac_24khz": dac_24khz, "mimi": mimi}


def seconds_of(run: Callable[[], object], runs: int) -> list[float]:
    """Times of `runs` calls after one to warm up, which counts itself if it is longer than `WARM`."""
    seconds: list[float] = []
    while len(seconds) < 1 + runs and (len(seconds) < runs or seconds[0] < WARM):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds[-runs:]


def compare(name: str, case: Case, quick: bool, runs: int) -> dict[str, float]:
    """Check and time a codec; prints its rows, returns the ratios."""
    ours = next(iter(case.ours.values()))
    rate, count = ours.spec.sample_rate or 1, case.num_quantizers
    clip_seconds = [1, 2] if quick else [1, 3, 5, 7, 9, 11, 13, 15]
    lengths = torch.tensor([round(rate * seconds) - 37 * index for index, seconds in enumerate(clip_seconds)])
    generator = torch.Generator().manual_seed(2)
    audio = 0.1 * torch.randn(len(lengths), ours.spec.channels, int(lengths.max()), generator=generator)
    mask = torch.arange(audio.shape[2]) < lengths[:, None]
    audio *= mask[:, None]
    clips = [audio[row : row + 1, :, :length] for row, length in enumerate(lengths.tolist())]
    total = float(lengths.sum()) / rate
    codes = ours.encode(audio, lengths, num_quantizers=count)
    alone = [codes.item(row)[None] for row in range(len(clips))]
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    for label, tokenizer in case.ours.items():

        def encode(tokenizer: Tokenizer = tokenizer) -> Codes:
            return tokenizer.encode(audio, lengths, num_quantizers=count)

        def decode(tokenizer: Tokenizer = tokenizer) -> Tensor:
            return tokenizer.decode(Codes(codes.codes, codes.lengths))

        ways[label] = encode, decode
    for peer in case.peers:
        pairs = [(peer.encode(clip, None), mine) for clip, mine in zip(clips, alone, strict=True)]
        different = sum(int((theirs != mine).sum()) for theirs, mine in pairs)
        error = max(
            float((peer.decode(mine).flatten() - ours.decode(mine).flatten()).abs().max())
            for mine in (alone[0], alone[-1])
        )
        print(
            f"  codes against {peer.name}: {different} of {sum(mine.numel() for mine in alone)} differ; "
            f"decoded audio to {error:.1e}"
        )
        ways[f"{peer.name}, clip by clip"] = (
            lambda peer=peer: [peer.encode(clip, None) for clip in clips],
            lambda peer=peer: [peer.decode(mine) for mine in alone],
        )
        if peer.batches:
            ways[f"{peer.name}, padded"] = (
                lambda peer=peer: peer.encode(audio, mask),
                lambda peer=peer: peer.decode(codes.codes),
            )
    times = {label: (seconds_of(way[0], runs), seconds_of(way[1], runs)) for label, way in ways.items()}
    print(f"  {'':32s} {'encode':>12s} {'decode':>12s}   times real time (spread of {runs} runs)")
    for label, pair in times.items():
        speeds = [(total / statistics.median(some), total / max(some), total / min(some)) for some in pair]
        print(f"  {label:32s} " + " ".join(f"{mid:6.1f} ({low:.1f}-{high:.1f})" for mid, low, high in speeds))
    for note in case.notes:
        print(f"  {note}")
    ratios = {}
    medians = {label: [statistics.median(some) for some in pair] for label, pair in times.items()}
    for label in case.ours:
        for peer in case.peers:
            rivals = [pair for rival, pair in medians.items() if rival.startswith(f"{peer.name},")]
            best = [min(pair[way] for pair in rivals) for way in (0, 1)]
            mine = medians[label]
            each = best[0] / mine[0], best[1] / mine[1]
            both = sum(best) / sum(mine)
            met = "reached" if min(each) >= peer.bar else "missed"
            print(
                f"  {label} over {peer.name}: encode {each[0]:.2f}, decode {each[1]:.2f}, both {both:.2f} "
                f"(bar {peer.bar}: {met})"
            )
            key = f"{name}{'' if label == 'ours' else ' ' + label} / {peer.name}"
            ratios[f"{key}, encode"], ratios[f"{key}, decode"] = round(each[0], 2), round(each[1], 2)
    return ratios


def hour(name: str, case: Case) -> dict[str, float]:
    """Encode one hour in one call: peak memory, and the first five minutes against a call of their own."""
    ours = next(iter(case.ours.values()))
    rate = ours.spec.sample_rate or 1
    audio = torch.empty(1, ours.spec.channels, 3600 * rate).normal_(std=0.1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    codes = ours.encode(audio, num_quantizers=case.num_quantizers)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    part = ours.encode(audio[:, :, : 300 * rate], num_quantizers=case.num_quantizers).codes
    different = int((codes.codes[:, :, : part.shape[2]] != part).sum())
    print(
        f"  one hour in {seconds:.0f} s ({3600 / seconds:.0f} times real time); peak {peak / 2**20:.2f} GiB (bar 1.5)"
    )
    print(f"  of that {before / 2**20:.2f} GiB before, with {audio.numel() * 4 / 2**30:.2f} GiB of audio")
    print(f"  first 5 minutes alone: {different} of {part.numel()} codes differ")
    theirs = case.peers[0].encode(audio[:, :, : 300 * rate], None)
    different = int((theirs != part).sum())
    print(f"  first 5 minutes in one pass of {case.peers[0].name}: {different} of {part.numel()} codes differ")
    return {f"{name} hour, GiB below 1.5": round(1.5 / (peak / 2**20), 2)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all if none is named")
    parser.add_argument("--quick", action="store_true", help="two short clips instead of eight up to 15 s")
    parser.add_argument("--runs", type=int, default=5, help="measured after one to warm up; the median counts")
    parser.add_argument("--compiled", action="store_true", help="also ours with torch.compile, where a case has it")
    parser.add_argument("--hour", action="store_true", help="one hour of audio instead")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    ratios: dict[str, float] = {}
    for name in given.cases or CASES:
        case = CASES[name]()
        if not given.compiled:
            case.ours = {label: ours for label, ours in case.ours.items() if not label.endswith("compiled")}
        print(f"{name}: {case.num_quantizers} codebooks, {given.threads} threads, float32")
        ratios |= hour(name, case) if given.hour else compare(name, case, given.quick, given.runs)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"benchmark": "codecs", "ratios": ratios, "versions": versions}))


if __name__ == "__main__":
    main()
