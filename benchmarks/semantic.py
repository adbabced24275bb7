"""What a teacher brings: two codecs of one size, with and without, by what their first codebooks say.

Words: spoken digits, `{digit}_{speaker}_{take}.wav` (Free Spoken Digit Dataset); a linear probe on the first codebook's
entries, averaged over quarters of a clip, must know the digits of a speaker it never heard. Phones: sentences from
Python's own documentation, spoken by four voices of flite, which also says when each phone begins; a linear probe on
the entries of a code and its neighbours must know the phones of a voice it never heard. Beside it, how much of the
phones' entropy single codes explain.

    anyglot train tokenizer/speech --data DIR --run_dir a
    anyglot train tokenizer/speech --data DIR --run_dir b --teacher.source ""
    python benchmarks/semantic.py a/tokenizer b/tokenizer DIGITS
"""

from __future__ import annotations

import json
import pydoc_data.topics
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anyglot_tokenizers import load, read_audio
from anyglot_tokenizers.audio import AudioCodec
from anyglot_tokenizers.probe import context_entries, label_information, linear_probe, mean_entries

VOICES = ("kal16", "awb", "rms", "slt")
SENTENCES = 60
QUARTERS = 4
EVERY = 3  # of so many positions one is probed: neighbours say the same
LOUDNESS = 0.08  # root mean square to which all clips are brought


def level(audio_CS: Tensor) -> Tensor:
    return (audio_CS * (LOUDNESS / audio_CS.square().mean().sqrt().clamp(min=1e-4))).clamp(-1, 1)


def digits(folder: Path) -> list[tuple[Tensor, str, str]]:
    """(audio, digit, speaker) of every file."""
    files = sorted(folder.glob("*_*_*.wav"))
    return [(level(read_audio(file, sample_rate=16000)), *file.stem.split("_")[:2]) for file in files]  # type: ignore[misc]


def spoken(sentence: str, voice: str) -> tuple[Tensor, list[str], np.ndarray]:
    """Audio of a sentence, its phones and when each ends, in seconds."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["flite", "-voice", voice, "-psdur", "-t", sentence, "-o", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        audio = level(read_audio(file.name, sample_rate=16000))
    pairs = [word.rpartition(":") for word in said.split()]
    return audio, [name for name, _, _ in pairs], np.array([float(end) for _, _, end in pairs])


def sentences() -> list[str]:
    text = re.sub(r"\s+", " ", " ".join(pydoc_data.topics.topics.values()))
    found = [part for part in re.split(r"(?<=\.) ", text) if re.fullmatch(r"[A-Z][a-z ,']+\.", part)]
    found = [part for part in dict.fromkeys(found) if 7 <= len(part.split()) <= 14]
    return [found[place] for place in np.random.default_rng(0).permutation(len(found))[:SENTENCES]]


def probes(codec: AudioCodec, words: list[tuple[Tensor, str, str]], said: dict[str, list]) -> dict[str, float]:
    """Accuracies of the two probes, and the share of the phones' entropy that codes explain."""
    book_CD = codec.codebooks[0].detach()  # type: ignore[index]
    rows = []
    for audio, _, _ in words:
        parts = codec.encode(audio[None], num_quantizers=1).codes[0].tensor_split(QUARTERS, 1)
        rows.append(torch.cat([mean_entries(part, book_CD[None]) for part in parts]))
    word = linear_probe(torch.stack(rows), [digit for _, digit, _ in words], [who for _, _, who in words])
    features, phones, voices, codes = [], [], [], []
    for voice, clips in said.items():
        for audio, names, ends in clips:
            codes_T = codec.encode(audio[None], num_quantizers=1).codes[0, 0]
            middles = (np.arange(len(codes_T)) + 0.5) * codec.hop_length / codec.sample_rate
            here = [names[place] for place in np.searchsorted(ends, middles).clip(max=len(names) - 1)]
            features.append(context_entries(codes_T, book_CD, 1)[::EVERY])
            phones += here[::EVERY]
            voices += [voice] * len(here[::EVERY])
            codes.append(codes_T[::EVERY])
    known = sorted(set(phones))
    phone = linear_probe(torch.cat(features), phones, voices)
    labels = torch.tensor([known.index(name) for name in phones])
    shares = {"digit": word["accuracy"], "digit, low": word["low"], "digit, high": word["high"]}
    shares |= {"phone": phone["accuracy"], "phone, low": phone["low"], "phone, high": phone["high"]}
    shares |= {"phone information": label_information(torch.cat(codes), labels)}
    print(f"  chance: digit {word['chance']:.3f} of {word['n']} clips, phone {phone['chance']:.3f} of {phone['n']}")
    return shares


def main() -> None:
    ratios: dict[str, float] = {}
    if len(sys.argv) != 4:
        print("skipped: needs two codecs and a folder of spoken digits, see the head of this file")
    else:
        words = digits(Path(sys.argv[3]))
        said = {voice: [spoken(sentence, voice) for sentence in sentences()] for voice in VOICES}
        results = []
        for folder in sys.argv[1:3]:
            codec = load(folder)
            assert isinstance(codec, AudioCodec)
            results.append(probes(codec, words, said))
            print(folder, {name: round(value, 3) for name, value in results[-1].items()}, flush=True)
        names = ("digit", "phone", "phone information")
        ratios = {f"{name}, with teacher over without": round(results[0][name] / results[1][name], 3) for name in names}
    print(json.dumps({"benchmark": "semantic", "ratios": ratios, "versions": {"torch": torch.__version__}}))


if __name__ == "__main__":
    main()
