"""Judges of speech: what words of nanoworld does a recording say?

`SpeechJudge` is a small word-level recogniser: log-mel features, a stack of ConvNeXt blocks (Liu et al. 2022,
https://github.com/facebookresearch/ConvNeXt) over 40 ms frames, and CTC (Graves et al. 2006) over the closed
vocabulary. Train one for the voices of your machine, in minutes, with
`python -m anyglot_synth.nanoworld.judge train --out FOLDER`; weights trained on the voices of `voices.py`
come with the package. It has no language model: it writes what it hears, sense or nonsense, so that its word
errors are the speaker's. `SphinxJudge` is a second opinion.

This file does not know what a scene is worth: turn a transcript into a scene with `language.parse`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from anyglot_synth.nanoworld.language import NUMBERS, describe, question, words
from anyglot_synth.nanoworld.language import WORDS as DESCRIPTION_WORDS
from anyglot_synth.nanoworld.records import generate, spoken_sentences
from anyglot_synth.nanoworld.scene import sample_scene
from anyglot_synth.nanoworld.sphinx import SphinxJudge
from anyglot_synth.nanoworld.voices import (
    SAMPLE_RATE,
    VOICES,
    Float32,
    SpeechCache,
    Voice,
    check_audio,
    clauses,
    default_cache_dir,
    find_voice,
    installed_voices,
)
from anyglot_tokenizers.errors import AnyglotError, CheckpointError
from anyglot_tokenizers.files import atomic_write

# Shape suffixes: B utterances, N samples, M mel bins, T frames of 10 ms, S frames of 40 ms, D channels,
# V words and the blank.

PathLike = str | os.PathLike[str]

WEIGHTS = Path(__file__).with_name("weights") / "judge"
BLANK = 0
WINDOW, HOP, MELS = 400, 160, 64


def vocabulary() -> tuple[str, ...]:
    """Every word that is said about nanoworld: those of descriptions, then of questions and answers."""
    said = {word for sentence in spoken_sentences() for word in words(sentence)} | set(NUMBERS)
    return (*DESCRIPTION_WORDS, *sorted(said - set(DESCRIPTION_WORDS)))


def _mel_filters() -> Tensor:
    """Triangular filters, evenly spaced on the mel scale from 40 Hz to 7.6 kHz: float32 [MELS, 257]."""

    def mel(hertz: Tensor) -> Tensor:
        return 2595 * torch.log10(1 + hertz / 700)

    low, high = mel(torch.tensor([40.0, 7600.0])).tolist()
    edges = torch.linspace(low, high, MELS + 2)
    bins = mel(torch.linspace(0, SAMPLE_RATE / 2, 512 // 2 + 1))
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over 9 frames, then a pointwise bottleneck; residual. [B, D, S] -> [B, D, S]."""

    def __init__(self, dim: int, expansion: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, 9, padding=4, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, dim * expansion)
        self.down = nn.Linear(dim * expansion, dim)

    def forward(self, x_BDS: Tensor, mask_B1S: Tensor) -> Tensor:
        y_BDS = self.depthwise(x_BDS * mask_B1S)
        y_BSD = self.down(F.gelu(self.up(self.norm(y_BDS.transpose(1, 2)))))
        return x_BDS + y_BSD.transpose(1, 2)


class Recogniser(nn.Module):
    """Waveforms -> log-probabilities of words, one distribution per 40 ms."""

    mel_filters: Tensor
    window: Tensor

    def __init__(self, num_words: int, dim: int = 96, num_blocks: int = 5, expansion: int = 2) -> None:
        super().__init__()
        self.stem = nn.ModuleList(
            [nn.Conv1d(MELS, dim, 5, stride=2, padding=2), nn.Conv1d(dim, dim, 5, stride=2, padding=2)]
        )
        self.blocks = nn.ModuleList(ConvNeXtBlock(dim, expansion) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_words + 1)
        self.register_buffer("mel_filters", _mel_filters(), persistent=False)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)

    def features(self, audio_BN: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Log-mel features at equal loudness [B, M, T] (zero where padded) and their lengths [B]."""
        valid_BN = torch.arange(audio_BN.shape[1]) < lengths_B[:, None]
        audio_BN = audio_BN * valid_BN
        power_B = audio_BN.square().sum(1) / lengths_B
        audio_BN = audio_BN / power_B.clamp(min=1e-8).sqrt()[:, None]
        spectrum_BFT = torch.stft(
            audio_BN, 512, HOP, WINDOW, self.window, center=True, pad_mode="constant", return_complex=True
        )
        mel_BMT = self.mel_filters @ spectrum_BFT.abs().square()
        frames_B = 1 + lengths_B // HOP
        mask_B1T = (torch.arange(mel_BMT.shape[2]) < frames_B[:, None])[:, None]
        return (mel_BMT.clamp(min=1e-2).log() - 2.0) / 4.0 * mask_B1T, frames_B

    def forward(self, x_BMT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Features and their lengths -> log-probabilities [B, S, V] and lengths [B] in frames of 40 ms."""
        for convolution in self.stem:
            lengths_B = (lengths_B + 1) // 2
            x_BMT = F.gelu(convolution(x_BMT))
            mask_B1S = (torch.arange(x_BMT.shape[2]) < lengths_B[:, None])[:, None]
            x_BMT = x_BMT * mask_B1S
        for block in self.blocks:
            x_BMT = block(x_BMT, mask_B1S)
        return self.head(self.norm(x_BMT.transpose(1, 2))).log_softmax(-1), lengths_B


class SpeechJudge:
    """Writes down the words of nanoworld it hears. Made by `SpeechJudge.load()`."""

    def __init__(self, model: Recogniser, vocabulary: Sequence[str]) -> None:
        self.model = model.eval()
        self.vocabulary = tuple(vocabulary)

    @classmethod
    def load(cls, folder: PathLike | None = None) -> SpeechJudge:
        """Load a judge written by `train_judge`; by default the one that comes with the package.

        Raises:
            CheckpointError: files are missing, damaged, or not a judge's.
        """
        folder = WEIGHTS if folder is None else Path(folder)
        retrain = "make it with: python -m anyglot_synth.nanoworld.judge train --out FOLDER"
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            with torch.random.fork_rng(devices=[]):  # the first, random weights must not draw from the user's
                model = Recogniser(len(config["words"]), config["dim"], config["num_blocks"], config["expansion"])
            weights = load_file(folder / "model.safetensors")
            model.load_state_dict({name: value.float() for name, value in weights.items()})
        except FileNotFoundError as error:
            raise CheckpointError(f"{error.filename or folder}: no such file; {retrain}") from error
        except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} holds no usable judge ({str(error).splitlines()[0]}); {retrain}"
            ) from error
        return cls(model, config["words"])

    def save(self, folder: PathLike, notes: dict[str, Any] | None = None) -> None:
        """Write float16 weights and config.json (with `notes`, e.g. error rates) to a folder."""
        first = self.model.blocks[0]
        assert isinstance(first, ConvNeXtBlock)
        dim = first.norm.normalized_shape[0]
        config = {
            "dim": dim,
            "num_blocks": len(self.model.blocks),
            "expansion": first.up.out_features // dim,
            "sample_rate": SAMPLE_RATE,
            "words": list(self.vocabulary),
            **(notes or {}),
        }
        weights = {name: value.half().contiguous() for name, value in self.model.state_dict().items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(folder) / "model.safetensors") as path:
            path.write_bytes(save(weights))
        with atomic_write(Path(folder) / "config.json") as path:
            path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    @torch.inference_mode()
    def transcribe(self, audios: Sequence[Float32], batch_size: int = 32) -> list[str]:
        """Transcribe waveforms [samples] at 16 kHz, of any loudness, up to a minute each.

        The transcript of one does not depend on the others of its batch. Silence gives an empty string.

        Raises:
            MediaError: an array is not mono, not finite, or too long.
        """
        checked = [check_audio(audio, number) for number, audio in enumerate(audios)]
        order = sorted(range(len(checked)), key=lambda i: len(checked[i]))
        found = [""] * len(checked)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            features, lengths = self.model.features(*_pad([checked[i] for i in batch]))
            scores_BSV, lengths = self.model(features, lengths)
            for i, best_S, length in zip(batch, scores_BSV.argmax(-1), lengths.tolist(), strict=True):
                heard = torch.unique_consecutive(best_S[:length]).tolist()
                found[i] = " ".join(self.vocabulary[word - 1] for word in heard if word != BLANK)
                if float(np.abs(checked[i]).max()) < 1e-4:
                    found[i] = ""
        return found


def _pad(audios: Sequence[Float32]) -> tuple[Tensor, Tensor]:
    lengths_B = torch.tensor([len(audio) for audio in audios])
    audio_BN = torch.zeros(len(audios), int(lengths_B.max()))
    for row, audio in zip(audio_BN, audios, strict=True):
        row[: len(audio)] = torch.from_numpy(audio)
    return audio_BN, lengths_B


# --- training ---


class _Utterances:
    """Endless random utterances of the training scenes: descriptions, questions, answers, and shuffled words.

    The shuffled ones keep the recogniser from learning the world's grammar instead of its words.
    """

    def __init__(self, cache: SpeechCache, voices: Sequence[Voice], seed: int, num_shuffled: int = 500) -> None:
        self.cache = cache
        self.voices = tuple(voices)
        rng = np.random.default_rng([seed, 1])
        known = np.array(vocabulary())
        self.shuffled = {
            voice: [" ".join(rng.choice(known, int(rng.integers(1, 6)))) for _ in range(num_shuffled)]
            for voice in self.voices
        }

    def prefetch(self, progress: Callable[[int, int], None] | None = None) -> None:
        self.cache.prefetch(spoken_sentences(), self.voices, progress)
        for voice, sentences in self.shuffled.items():
            self.cache.prefetch(sentences, [voice])

    def draw(self, rng: np.random.Generator) -> tuple[Float32, str]:
        """(waveform [samples], its words)."""
        voice = self.voices[int(rng.integers(len(self.voices)))]
        kind = rng.random()
        if kind < 0.25:
            sentence = self.shuffled[voice][int(rng.integers(len(self.shuffled[voice])))]
        elif kind < 0.45:
            sentence = question(sample_scene(rng, "train"), rng)[int(rng.integers(2))]
        else:
            return self._description(rng, voice)
        return self.cache.say(sentence, voice), sentence

    def batches(self, rng: np.random.Generator, size: int) -> Iterator[list[tuple[Float32, str]]]:
        """Endless batches of utterances of much the same length, to pad little."""
        while True:
            drawn = [self.draw(rng) for _ in range(size * 8)]
            drawn.sort(key=lambda pair: len(pair[0]))
            for start in rng.permutation(8) * size:
                yield drawn[start : start + size]

    def _description(self, rng: np.random.Generator, voice: Voice) -> tuple[Float32, str]:
        """A scene's clauses with pauses of 0 to 200 ms, so that nothing hangs on the exact pause."""
        said = clauses(describe(sample_scene(rng, "train"), rng, style="spoken"))
        pieces = [np.zeros(int(rng.uniform(0, 0.2) * SAMPLE_RATE), np.float32)]
        for clause in said:
            pieces += [
                self.cache.clip(clause, voice),
                np.zeros(int(rng.uniform(0, 0.2) * SAMPLE_RATE), np.float32),
            ]
        return np.concatenate(pieces), " ".join(said)


def _spoil(audio: Float32, rng: np.random.Generator) -> Float32:
    """Speed (+-8 %), spectral tilt and low-pass, white noise (15 to 40 dB below the speech), each now and then."""
    if rng.random() < 0.4:
        positions = np.arange(0, len(audio) - 1, rng.uniform(0.92, 1.08))
        audio = np.interp(positions, np.arange(len(audio)), audio).astype(np.float32)
    if rng.random() < 0.5:
        size = -(-len(audio) // 4096) * 4096  # sizes without large prime factors transform fast
        octaves = np.log2(np.fft.rfftfreq(size, 1 / SAMPLE_RATE).clip(50) / 1000)
        gain_db = rng.uniform(-4, 4) * octaves - 24 * (octaves - rng.uniform(1.5, 3.2)).clip(0)
        audio = np.fft.irfft(np.fft.rfft(audio, size) * 10 ** (gain_db / 20), size)[: len(audio)].astype(np.float32)
    if rng.random() < 0.6:
        level = np.sqrt(np.mean(audio**2)) * 10 ** (-rng.uniform(15, 40) / 20)
        audio = audio + rng.normal(0, level, len(audio)).astype(np.float32)
    return audio


def _mask(x_BMT: Tensor, lengths_B: Tensor, rng: np.random.Generator) -> Tensor:
    """SpecAugment (Park et al. 2019), and log-normal noise and smearing in time such as codecs make."""
    x_BMT = x_BMT.clone()
    for x_MT, length in zip(x_BMT, lengths_B.tolist(), strict=True):
        if rng.random() < 0.4:
            noise = rng.normal(0, rng.uniform(0.02, 0.15), (x_MT.shape[0], length))
            x_MT[:, :length] += torch.from_numpy(noise.astype(np.float32))
        if rng.random() < 0.2:
            x_MT[:, :length] = F.avg_pool1d(x_MT[None, :, :length], 3, 1, 1, count_include_pad=False)[0]
        for _ in range(int(rng.integers(3))):
            low, width = int(rng.integers(MELS - 8)), int(rng.integers(1, 9))
            x_MT[low : low + width, :length] = 0
        for _ in range(int(rng.integers(3))):
            start, width = int(rng.integers(max(1, length - 6))), int(rng.integers(1, 7))
            x_MT[:, start : min(start + width, length)] = 0
    return x_BMT


def train_judge(
    out_dir: PathLike,
    cache_dir: PathLike | None = None,
    steps: int = 2400,
    seed: int = 0,
    *,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    workers: int = 2,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train a judge on training scenes in every voice of this machine, test it on test scenes, write it to `out_dir`.

    The same arguments, voices and number of threads give the same weights. About 0.15 s a step on one CPU
    core.

    Args:
        out_dir: folder for `model.safetensors` (float16) and `config.json`.
        cache_dir: folder of spoken clips, filled first (a minute); None takes `default_cache_dir()`.
        steps: optimiser steps of `batch_size` utterances.
        seed: of weights, utterances and augmentation.
        workers: engine processes while clips are spoken.
        log: called with a line of text now and then.

    Returns:
        word error rate per voice, and "all", as `word_error_rates` of the written files.

    Raises:
        SpeechError: no speech engine on this machine.
    """
    cache_dir = default_cache_dir() if cache_dir is None else cache_dir
    chosen = installed_voices() or VOICES
    utterances = _Utterances(SpeechCache(cache_dir, workers), chosen, seed)
    utterances.prefetch(lambda done, total: log(f"spoken {done}/{total}") if done % 500 == 0 else None)
    known = vocabulary()
    number = {word: index for index, word in enumerate(known, start=1)}
    rng = np.random.default_rng([seed, 2])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Recogniser(len(known))
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.15)
    model.train()
    mean_loss = 0.0
    for step, drawn in zip(range(1, steps + 1), utterances.batches(rng, batch_size), strict=False):
        labels = [[number[word] for word in words(text)] for _, text in drawn]
        with torch.no_grad():
            x_BMT, lengths_B = model.features(*_pad([_spoil(audio, rng) for audio, _ in drawn]))
            x_BMT = _mask(x_BMT, lengths_B, rng)
        scores_BSV, lengths_B = model(x_BMT, lengths_B)
        targets = torch.tensor([label for row in labels for label in row])
        counts_B = torch.tensor([len(row) for row in labels])
        loss = F.ctc_loss(scores_BSV.transpose(0, 1), targets, lengths_B, counts_B, BLANK, zero_infinity=True)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean_loss += (loss.item() - mean_loss) / min(step, 50)
        if step % 100 == 0 or step == steps:
            log(f"step {step}/{steps}  loss {mean_loss:.4f}")
    judge = SpeechJudge(model, known)
    judge.save(out_dir)
    judge = SpeechJudge.load(out_dir)
    rates = word_error_rates(judge.transcribe, cache_dir=cache_dir, voices=chosen, workers=workers)
    trained = {
        "steps": steps,
        "seed": seed,
        "batch_size": batch_size,
        "voices": [voice.name for voice in chosen],
    }
    judge.save(out_dir, {"trained": trained, "word_error_rate": {name: round(r, 5) for name, r in rates.items()}})
    return rates


def word_error_rates(
    transcribe: Callable[[Sequence[Float32]], list[str]],
    num: int = 100,
    seed: int = 0,
    *,
    cache_dir: PathLike | None = None,
    voices: Sequence[Voice | str] = VOICES,
    workers: int = 1,
) -> dict[str, float]:
    """Word error rate of a judge on the clean speech of `num` test scenes in each voice; "all" is over all voices.

    Needs jiwer. Raises SpeechError: no speech engine on this machine.
    """
    import jiwer

    cache = SpeechCache(default_cache_dir() if cache_dir is None else cache_dir, workers)
    texts = [record.spoken_text for record in generate("test", num, seed, parts=())]
    said = [" ".join(words(text)) for text in texts]
    chosen = [find_voice(voice) for voice in voices]
    heard = {}
    for voice in chosen:
        cache.prefetch_said((text, voice) for text in texts)
        heard[voice.name] = transcribe([cache.say(text, voice) for text in texts])
    rates = {name: float(jiwer.wer(said, found)) for name, found in heard.items()}
    return {**rates, "all": sum(rates.values()) / len(rates)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: `train` a judge or `test` one; see --help."""
    parser = argparse.ArgumentParser(prog="python -m anyglot_synth.nanoworld.judge", description="Speech judge")
    parser.add_argument("action", choices=("train", "test"))
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the judge (default: the package's own)")
    parser.add_argument("--cache", type=Path, default=None, help="folder of spoken clips")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sphinx", action="store_true", help="test pocketsphinx instead")
    given = parser.parse_args(arguments)
    try:
        if given.action == "train":
            rates = train_judge(given.out, given.cache, given.steps, given.seed)
        else:
            judge = SphinxJudge() if given.sphinx else SpeechJudge.load(given.out)
            rates = word_error_rates(judge.transcribe, cache_dir=given.cache)
    except AnyglotError as error:
        print(error, file=sys.stderr)
        return 2
    for name, rate in rates.items():
        print(f"{name:8} word error rate {100 * rate:.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
