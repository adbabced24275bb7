"""Our speech codec against EnCodec-24k of transformers: encoding plus decoding, and the memory an hour of audio takes.

Both have random weights at their real sizes, work at about 3 kbps (ours at no more than 4), clip by clip, float32, on
the same threads, turn by turn in one process. They are different codecs, so what is checked is that each gives audio of
the right length for every clip; and for the hour, encoded in a process of its own, that the codes of its first five
minutes are those of the five minutes in one piece.

    python benchmarks/native_codec.py [threads]
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from anyglot_tokenizers import AudioCodec

LAPTOP = {
    "hop": 320,
    "stride": 1,
    "dim": 256,
    "encoder_depth": 4,
    "decoder_depth": 6,
    "num_quantizers": 8,
    "codebook_size": 1024,
}
"""The speech codec of `configs/tokenizer/speech.yaml`, laptop size."""
SECONDS = (1, 2, 3, 5, 7, 9, 12, 15)
RUNS = 5
MEMORY_GIB = 1.5


def codec() -> AudioCodec:
    return AudioCodec(**LAPTOP).eval()  # type: ignore[arg-type]


def noise(seconds: float, sample_rate: int) -> Tensor:
    generator = torch.Generator().manual_seed(round(seconds))
    return 0.1 * torch.randn(1, 1, round(seconds * sample_rate), generator=generator)


def encode_hour() -> None:
    """Print the peak memory of this process, and whether chunks changed the codes."""
    ours = codec()
    hour = torch.empty(1, 1, 3600 * ours.sample_rate).normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    codes = ours.encode(hour).codes
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    ours.max_samples = hour.shape[2]  # from here on in one piece
    whole = ours.encode(hour[..., : 300 * ours.sample_rate]).codes
    until = whole.shape[2] - ours.spec.context[1]  # type: ignore[index]
    equal = bool(torch.equal(codes[..., :until], whole[..., :until]))
    print(json.dumps({"peak_gib": peak, "seconds": seconds, "equal": equal}))


def turns(runs: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds of each, taking turns, after one warm-up each."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(RUNS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    import transformers
    from transformers import EncodecConfig, EncodecModel

    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    torch.set_num_threads(threads)
    ours = codec()
    torch.manual_seed(0)
    theirs = EncodecModel(EncodecConfig()).eval()
    our_clips = [noise(seconds, ours.sample_rate) for seconds in SECONDS]
    their_clips = [noise(seconds, 24000) for seconds in SECONDS]

    def run_ours() -> None:
        for clip in our_clips:
            audio = ours.decode(ours.encode(clip))
            assert 0 <= audio.shape[2] - clip.shape[2] < ours.hop_length

    def run_theirs() -> None:
        for clip in their_clips:
            with torch.inference_mode():
                output = theirs.encode(clip, bandwidth=3.0)
                audio = theirs.decode(output.audio_codes, output.audio_scales).audio_values
            assert 0 <= audio.shape[2] - clip.shape[2] < 320

    total = sum(SECONDS)
    medians = {}
    for name, seconds in turns({"ours": run_ours, "EnCodec-24k": run_theirs}).items():
        medians[name] = statistics.median(seconds)
        model = ours if name == "ours" else theirs
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(
            f"{name:12s} {millions:5.1f} M parameters  {total / medians[name]:7.1f} times real time "
            f"({total / max(seconds):.1f} to {total / min(seconds):.1f}), {threads} threads, {len(SECONDS)} clips"
        )
    print(
        f"ours: {ours.spec.bitrate / 1000:.2f} kbps, {ours.spec.frame_rate:g} frames a second; EnCodec: 3.00 kbps, 75"
    )

    done = subprocess.run([sys.executable, __file__, "--hour"], capture_output=True, text=True, check=True)
    hour = json.loads(done.stdout.splitlines()[-1])
    assert hour["equal"], "an hour in chunks gave other codes than five minutes in one piece"
    print(
        f"one hour: encoded in {hour['seconds']:.1f} s ({3600 / hour['seconds']:.0f} times real time), process peak "
        f"{hour['peak_gib']:.2f} GiB of {MEMORY_GIB} allowed; first 5 minutes equal to the codes in one piece"
    )
    ratios = {
        "speed_over_encodec_24k": medians["EnCodec-24k"] / medians["ours"],
        "times_real_time": total / medians["ours"],
        "memory_allowed_over_peak": MEMORY_GIB / hour["peak_gib"],
    }
    print(
        json.dumps(
            {
                "benchmark": "native_codec",
                "ratios": {name: round(ratio, 2) for name, ratio in ratios.items()},
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
        )
    )


if __name__ == "__main__":
    encode_hour() if "--hour" in sys.argv else main()
