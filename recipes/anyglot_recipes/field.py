"""The `field` recipe: human speech, photos, emoji and chorales, held out by speaker, by picture and by piece.

Reads spoken digits (`{digit}_{speaker}_{take}.wav`), a folder of photos per signed digit, emoji with captions, and
chorales (MIDI) whose key stands for a digit; trains tokenizers and a language model on them, and answers: speech,
photo, chorale -> word, word -> speech, photo, chorale, speech -> word and photo, caption <-> emoji. Speech and
pictures are read in codes of what is said and shown (`heard`, `seen`: `field_meaning.py`), and made in codes that can
be decoded (`speech`, `image`); of music both are one. SmolLM2, a second model, only names emoji
(`field_captions.py`). One speaker and a tenth of the pictures and chorales are never
met in training (`field_eval.py` grades on them). Of nanoworld there are the timbres.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch

from anyglot_lm.adapter import SMOLLM2
from anyglot_lm.segments import Sample, Segment
from anyglot_lm.text import TextTokenizer
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.chain import (
    LMConfig,
    Run,
    TokenizerConfig,
    build_tokenizer,
    build_vocabulary,
    check_lm,
    encode_audio,
    encode_images,
    lm_blocks,
    new_tokenizer,
    seed_of,
    train_lm,
    train_tokenizer,
    write_shards,
)
from anyglot_recipes.field_captions import train_namer
from anyglot_recipes.field_meaning import (
    heard_variants,
    seen_variants,
    spoken,
    train_heard,
    train_seen,
)
from anyglot_recipes.field_music import Chorale, play, read_chorales
from anyglot_recipes.field_phones import read_phones, write_phones
from anyglot_recipes.field_practice import PracticeConfig, practise
from anyglot_recipes.field_voices import SAMPLE_RATE, WORDS, Voices, read_voices, write_voices
from anyglot_recipes.importers.rows import Media
from anyglot_recipes.manifest import Row, read_manifest
from anyglot_recipes.stage_cli import check_whole_names
from anyglot_synth.recognise import SphinxRecogniser
from anyglot_tokenizers import load
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.meaning import HeardVQ, SeenVQ
from anyglot_tokenizers.media import read_audio, read_image, write_image
from anyglot_tokenizers.tokenizer import Tokenizer

DIGITS = tuple("0123456789")
IMAGE_SIZE = 64
CODECS = ("image", "speech", "music")
WEIGHTS = {
    "speech->text": 0.20,
    "text->speech": 0.14,
    "text->photo": 0.32,
    "speech->text+image": 0.08,
    "photo->text": 0.09,
    "emoji->text": 0.10,
    "text->emoji": 0.07,
    "music->text": 0.06,
    "text->music": 0.18,
}
"""Weight in the training ids by task."""
REPLY_VARIANTS = 4
SEEN_VARIANTS = 16
PLAYED_VARIANTS = 2
"""Versions of a spoken answer, a picture that is read and a chorale, the original among them."""


@dataclass
class FieldDataConfig:
    """What is read and what is held out.

    Args:
        root: folder with spoken_digits, sign_digits, emoji, chorales_midi and (unlabelled) librispeech_clips.
        held_out_speaker: never heard in training.
        reply_speaker: the voice that the model answers in.
        held_out_share: share of photos, of emoji and of chorales never met in training, chosen by a hash of each.
        speech_variants: augmented versions of every training clip (speed, pitch, noise, tilt).
        image_variants: augmented versions of every training picture (shift, brightness; photos also mirrored).
    """

    root: str = "../shared/data/real"
    held_out_speaker: str = "jackson"
    reply_speaker: str = "lucas"
    held_out_share: float = 0.1
    speech_variants: int = 10
    image_variants: int = 6


@dataclass
class ReaderConfig:
    """A tokenizer for reading and its training.

    Args:
        model: arguments of `HeardVQ` or `SeenVQ`.
        max_steps: optimizer steps.
        batch_size: items per step.
        lr: peak learning rate.
        phone_steps: of `heard` only, steps before: of the phones that pocketsphinx hears in the unlabelled clips
            (0: they are not used).
    """

    model: dict[str, Any] = field(default_factory=dict)
    max_steps: int = 1500
    batch_size: int = 48
    lr: float = 3e-3
    phone_steps: int = 0


@dataclass
class FieldConfig:
    """The field recipe.

    Args:
        run_dir: everything is written below; run again with the same folder to continue.
        seed: of all randomness.
        data: what is read and held out.
        heard: tokenizer of speech that is read.
        seen: tokenizer of pictures that are read.
        image: image tokenizer, for pictures that are made.
        speech: speech codec, for speech that is made.
        music: music codec.
        lm: language model.
        practice: how the model then learns from its own answers (`field_practice.py`).
        captions: settings of SmolLM2's training, over those of configs/align.yaml, as `{"trainer.max_steps": 120}`;
            empty: only the model of the field trial names emoji.
        table: Markdown file for the table of results, or "" for none beside `run_dir/table.md`; a picture of drawings
            and a folder, with a page of answers that play, are written beside each.
    """

    run_dir: str = "runs/field"
    seed: int = 0
    data: FieldDataConfig = field(default_factory=FieldDataConfig)
    heard: ReaderConfig = field(default_factory=ReaderConfig)
    seen: ReaderConfig = field(default_factory=ReaderConfig)
    image: TokenizerConfig = field(default_factory=TokenizerConfig)
    speech: TokenizerConfig = field(default_factory=TokenizerConfig)
    music: TokenizerConfig = field(default_factory=TokenizerConfig)
    lm: LMConfig = field(default_factory=LMConfig)
    practice: PracticeConfig = field(default_factory=PracticeConfig)
    captions: dict[str, Any] = field(default_factory=dict)
    table: str = ""


@dataclass
class Clip:
    """A spoken digit: mono float32 audio at 16 kHz."""

    digit: int
    speaker: str
    audio: np.ndarray
    take: int = 0


@dataclass
class Picture:
    """A photo of a signed digit (`word` is its name) or an emoji (`word` is its caption); uint8 [64, 64, 3]."""

    kind: str
    word: str
    pixels: np.ndarray
    name: str


@dataclass
class FieldData:
    """Everything read, split."""

    clips: list[Clip]
    test_clips: list[Clip]
    pictures: list[Picture]
    test_pictures: list[Picture]
    unlabelled: list[np.ndarray]
    chorales: list[Chorale]
    test_chorales: list[Chorale]


def read_field_data(config: FieldDataConfig) -> FieldData:
    """Read and split the field data.

    Raises:
        ManifestError: a folder is missing or holds nothing, or the held-out speaker does not exist.
        MediaError: a damaged file.
    """
    root = Path(config.root)
    clips = []
    for path in sorted((root / "spoken_digits").glob("*.wav")):
        match = re.fullmatch(r"(\d)_([a-z]+)_(\d+)", path.stem)
        if match:
            audio = read_audio(path, sample_rate=SAMPLE_RATE)[0].numpy()
            clips.append(Clip(int(match[1]), match[2], _level(audio), int(match[3])))
    speakers = sorted({clip.speaker for clip in clips})
    if config.held_out_speaker not in speakers:
        raise ManifestError(
            f"{root / 'spoken_digits'}: no clips of held_out_speaker {config.held_out_speaker!r}; "
            f"speakers found: {', '.join(speakers) or 'none'} (set --data.root to the folder with the field data)"
        )
    if config.reply_speaker not in speakers or config.reply_speaker == config.held_out_speaker:
        raise ManifestError(f"data.reply_speaker {config.reply_speaker!r} must be one of the training speakers")
    music = read_chorales(root / "chorales_midi")
    pictures = []
    for row in _rows(root / "sign_digits", {}):
        if row.text in DIGITS and "image" in row.media:
            pictures.append(_picture("sign", WORDS[DIGITS.index(row.text)], row.media["image"]))
    for row in _rows(root / "emoji", {"file": "image", "caption": "text", "group": "ignore"}):
        if row.text and "image" in row.media:
            pictures.append(_picture("emoji", row.text.lower(), row.media["image"]))
    unlabelled = [
        _level(read_audio(path, sample_rate=SAMPLE_RATE)[0].numpy())
        for path in sorted((root / "librispeech_clips").rglob("*.flac"))
    ]
    # By content: two files with the same picture are never on both sides.
    held = [_held_out(p.kind.encode() + p.pixels.tobytes(), config.held_out_share) for p in pictures]
    train = [p for p, h in zip(pictures, held, strict=True) if not h]
    test = [p for p, h in zip(pictures, held, strict=True) if h]
    if len({p.word for p in test if p.kind == "emoji"}) < 20 or not any(p.kind == "sign" for p in test):
        raise ManifestError(
            f"{root}: needs 20 emoji of different captions and one photo held out; raise data.held_out_share"
        )
    lacking = [w for w in WORDS if not any(p.kind == "sign" and p.word == w for p in train)]
    if lacking:
        raise ManifestError(
            f"{root / 'sign_digits'}: no training photo of {', '.join(lacking)}; lower data.held_out_share"
        )
    pieces = [(_held_out(content, config.held_out_share), keys) for content, keys in music]
    chorales = [c for is_held, keys in pieces if not is_held for c in keys]
    known = {c.notes for c in chorales}  # some pieces end alike
    held_out = [keys for is_held, keys in pieces if is_held and not any(c.notes in known for c in keys)]
    test_chorales = [c for keys in held_out for c in keys]
    if not chorales or not test_chorales:
        raise ManifestError(f"{root / 'chorales_midi'}: {len(pieces)} chorales are too few; change data.held_out_share")
    return FieldData(
        clips=[c for c in clips if c.speaker != config.held_out_speaker],
        test_clips=[c for c in clips if c.speaker == config.held_out_speaker],
        pictures=train,
        test_pictures=test,
        unlabelled=unlabelled,
        chorales=chorales,
        test_chorales=test_chorales,
    )


def _rows(folder: Path, columns: dict[str, str]) -> Iterator[Row]:
    for row in read_manifest(folder, columns):
        if not isinstance(row, Row):
            raise ManifestError(f"{row.file}: {row.error}; mend or remove the row")
        yield row


def _picture(kind: str, word: str, path: Media) -> Picture:
    pixels = (read_image(path, size=IMAGE_SIZE) * 255).round().byte().permute(1, 2, 0).numpy()
    return Picture(kind, word, pixels, Path(str(path)).name)


def _held_out(content: bytes, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "little") < share * 2**32


def _level(audio: np.ndarray) -> np.ndarray:
    rms = float(np.sqrt(np.mean(audio**2)))
    peak = float(np.abs(audio).max())
    return (audio * min(0.08 / max(rms, 1e-6), 0.95 / max(peak, 1e-6))).astype(np.float32)


def vary_speech(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another speaker, roughly: speed and pitch together by resampling, tilt, gain, noise, a little silence."""
    ratio = float(np.exp(rng.uniform(-0.22, 0.22)))
    varied = soxr.resample(audio, SAMPLE_RATE, SAMPLE_RATE * ratio).astype(np.float32)
    tilt = float(rng.uniform(-0.5, 0.5))
    varied = varied + tilt * np.concatenate([[0], varied[:-1]]).astype(np.float32)
    lead, tail = (np.zeros(int(rng.integers(0, 1600)), np.float32) for _ in range(2))
    varied = _level(np.concatenate([lead, varied, tail])) * np.float32(10 ** (rng.uniform(-6, 3) / 20))
    noise = rng.standard_normal(len(varied)).astype(np.float32) * np.float32(0.08 * 10 ** (-rng.uniform(20, 50) / 20))
    result: np.ndarray = np.clip(varied + noise, -1, 1)
    return result


def reply_variant(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same voice a little faster or slower (3 %), shifted by up to a frame of the codec."""
    ratio = float(np.exp(rng.uniform(-0.03, 0.03)))
    varied = soxr.resample(audio, SAMPLE_RATE, SAMPLE_RATE * ratio).astype(np.float32)
    result: np.ndarray = np.concatenate([np.zeros(int(rng.integers(0, 640)), np.float32), varied])
    return result


def vary_picture(picture: Picture, rng: np.random.Generator) -> np.ndarray:
    """Shift by up to 4 pixels, brightness and contrast by up to 15 %; photos also mirrored (the other hand)."""
    pixels = picture.pixels
    if picture.kind == "sign" and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    reach = 4 if picture.kind == "sign" else 2
    pad = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    y, x = rng.integers(0, 2 * reach + 1, 2)
    moved = pad[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE].astype(np.float32)
    if picture.kind == "sign":
        moved = (moved - 128) * rng.uniform(0.85, 1.15) + 128 + rng.uniform(-20, 20)
    result: np.ndarray = moved.clip(0, 255).astype(np.uint8)
    return result


def say(word: str) -> Segment:
    """The prompt for a spoken digit."""
    return Segment("text", f"say {word}", "user")


def play_key(word: str) -> Segment:
    """The prompt for a chorale in the key of a digit."""
    return Segment("text", f"play {word}", "user")


def sign(word: str) -> Segment:
    """The prompt for a photo of a signed digit."""
    return Segment("text", f"sign {word}", "user")


def draw_emoji(caption: str) -> Segment:
    """The prompt for an emoji."""
    return Segment("text", f"emoji: {caption}", "user")


def training_samples(
    data: FieldData, config: FieldDataConfig, tokenizers: dict[str, Tokenizer], voices: Voices, seed: int
) -> Iterator[tuple[str, Sample]]:
    """(task, sample) of the training split, every clip and picture in several augmented versions."""
    rng = np.random.default_rng([seed, 5])
    heard, seen = tokenizers["heard"], tokenizers["seen"]
    assert isinstance(heard, HeardVQ) and isinstance(seen, SeenVQ)
    drawn: dict[str, list[np.ndarray]] = {word: [] for word in WORDS}
    emoji: list[tuple[str, np.ndarray]] = []
    for variant in range(config.image_variants):
        pixels = np.stack([p.pixels if variant == 0 else vary_picture(p, rng) for p in data.pictures])
        for picture, codes in zip(data.pictures, encode_images(tokenizers["image"], pixels), strict=True):
            if picture.kind == "sign":
                drawn[picture.word].append(codes)
            else:
                emoji.append((picture.word, codes))
    for word, photos in drawn.items():
        for codes in photos:
            yield "text->photo", _pair(sign(word), Segment("image", codes, "assistant"))
    for variant in range(PLAYED_VARIANTS):
        sounds = [play(c, rng if variant else None) for c in data.chorales]
        for chorale, codes in zip(data.chorales, encode_audio(tokenizers["music"], sounds, 64), strict=True):
            word = WORDS[chorale.digit]
            yield "music->text", _pair(Segment("music", codes, "user"), Segment("text", word, "assistant"))
            yield "text->music", _pair(play_key(word), Segment("music", codes, "assistant"))
    turn = dict.fromkeys(WORDS, 0)
    for digit, codes in heard_variants(heard, data.clips, voices, config.speech_variants, rng):
        word, given = WORDS[digit], Segment("heard", codes, "user")
        yield "speech->text", _pair(given, Segment("text", word, "assistant"))
        photo = drawn[word][turn[word] % len(drawn[word])]
        turn[word] += 1
        said = Segment("text", word, "assistant")
        yield "speech->text+image", Sample([given, said, Segment("image", photo, "assistant")])
    reply = [c for c in data.clips if c.speaker == config.reply_speaker]
    for variant in range(REPLY_VARIANTS):
        audio = [c.audio if variant == 0 else reply_variant(c.audio, rng) for c in reply]
        for clip, codes in zip(reply, encode_audio(tokenizers["speech"], audio, 64), strict=True):
            yield "text->speech", _pair(say(WORDS[clip.digit]), Segment("speech", codes, "assistant"))
    for picture, codes in seen_variants(seen, data.pictures, SEEN_VARIANTS, seed):
        task = "photo->text" if picture.kind == "sign" else "emoji->text"
        yield task, _pair(Segment("seen", codes, "user"), Segment("text", picture.word, "assistant"))
    for word, codes in emoji:
        yield "text->emoji", _pair(draw_emoji(word), Segment("image", codes, "assistant"))


def _pair(given: Segment, asked: Segment) -> Sample:
    return Sample([given, asked])


def field_trial(config: FieldConfig) -> dict[str, Any]:
    """Train and evaluate on the field data.

    Returns:
        `{"rows": [...], "seconds": ...}`; the table is in `run_dir/table.md` (and `config.table`), answers with players
        in `run_dir/table/index.html`.

    Raises:
        ManifestError: settings or data that cannot be.
        BackendError: pocketsphinx is not installed.
        CheckpointError: `captions` are to be trained, and SmolLM2 is not installed.
    """
    from anyglot_recipes.field_eval import evaluate_field
    from anyglot_recipes.field_page import markdown, players, sheet

    seed = config.seed
    check_lm(config.lm, modalities=("heard", "seen", *CODECS))
    config.practice.check(config.lm)
    if config.table and Path(config.table).suffix != ".md":
        raise ManifestError(f"table {config.table} must end in .md: a folder of the same name without it holds answers")
    check_whole_names(config.captions, "captions")
    if config.captions:
        SMOLLM2.place()
    new: dict[str, Tokenizer] = {}
    for name, reader, kind in (("heard", config.heard, HeardVQ), ("seen", config.seen, SeenVQ)):
        tokenizer = build_tokenizer(f"{kind.__module__}:{kind.__name__}", reader.model, f"{name}.")
        options = tokenizer.config
        if reader.max_steps <= options["num_quantizers"] * options["stage_steps"]:
            raise ManifestError(
                f"{name}.max_steps {reader.max_steps} ends before all codebooks have started; "
                f"train longer or lower {name}.model.stage_steps ({options['stage_steps']})"
            )
        new[name] = tokenizer
    new |= {name: new_tokenizer(name, getattr(config, name), seed) for name in CODECS}
    lm_blocks(new, config.lm, {})  # only to check settings before any work
    if config.heard.phone_steps < 0 or config.seen.phone_steps:
        raise ManifestError("heard.phone_steps must be 0 or more; seen has none")
    SphinxRecogniser().identity()  # it judges what is spoken: without it hours would end in nothing
    run = Run(config.run_dir, {k: v for k, v in vars(config).items() if k not in ("run_dir", "table", "practice")})
    data = read_field_data(config.data)
    run.say(
        f"{len(data.clips)} training clips, {len(data.test_clips)} of {config.data.held_out_speaker}; "
        f"{len(data.pictures)} training pictures, {len(data.test_pictures)} held out; "
        f"{len(data.chorales)} training chorales, {len(data.test_chorales)} held out; "
        f"{len(data.unlabelled)} unlabelled clips"
    )

    emoji = [p for p in data.pictures if p.kind == "emoji"]
    naming = train_namer(run, emoji, config.captions, seed) if config.captions else None

    def pictures() -> np.ndarray:
        rng = np.random.default_rng([seed, 3])
        rounds = max(config.image.num // len(data.pictures), 1)
        return np.stack([vary_picture(p, rng) for _ in range(rounds) for p in data.pictures])

    def sounds() -> list[np.ndarray]:
        rng = np.random.default_rng([seed, 4])
        rounds = max(config.speech.num // len(data.clips), 1)
        return [vary_speech(c.audio, rng) for _ in range(rounds) for c in data.clips] + data.unlabelled

    def music() -> list[np.ndarray]:
        rng = np.random.default_rng([seed, 6])
        return [play(data.chorales[i], rng) for i in rng.integers(len(data.chorales), size=config.music.num)]

    voices = read_voices(run.once("voices", lambda folder: write_voices(folder, run.say)))

    phones = None
    if config.heard.phone_steps:
        folder = run.once("phones", lambda folder: write_phones(data.unlabelled, folder))
        phones = read_phones(folder, data.unlabelled)
        run.say(f"phones of {len(phones.clips)} unlabelled clips")

    def heard(folder: Path) -> None:
        how = config.heard
        tokenizer = HeardVQ(**{"seed": seed, **how.model})
        digits = spoken(data.clips, voices)
        train_heard(
            tokenizer, digits, how.max_steps, seed, how.batch_size, how.lr, phones=phones, phone_steps=how.phone_steps
        )
        tokenizer.save_pretrained(folder, dtype=torch.float16)

    def seen(folder: Path) -> None:
        tokenizer = SeenVQ(**{"seed": seed, **config.seen.model})
        how = config.seen
        train_seen(tokenizer, data.pictures, how.max_steps, seed, how.batch_size, how.lr)
        tokenizer.save_pretrained(folder, dtype=torch.float16)

    tokenizers = {
        "heard": load(run.once("tokenizers/heard", heard)),
        "seen": load(run.once("tokenizers/seen", seen)),
        "image": train_tokenizer(run, "image", config.image, pictures, seed),
        "speech": train_tokenizer(run, "speech", config.speech, sounds, seed),
        "music": train_tokenizer(run, "music", config.music, music, seed),
    }

    def train_text(folder: Path) -> None:
        lines = [p.word for p in data.pictures] + [f"emoji: {p.word}" for p in data.pictures if p.kind == "emoji"]
        lines += [f"{verb} {word}" for word in WORDS for verb in ("say", "sign", "play")] * 50
        TextTokenizer.train(lines, folder / "text.model", vocab_size=config.lm.text_vocab_size)

    text = TextTokenizer.load(run.once("text", train_text) / "text.model")
    grids = {name: (IMAGE_SIZE // tokenizers[name].spec.downsample_factor,) * 2 for name in ("seen", "image")}
    vocabulary = build_vocabulary(text, tokenizers, config.lm, grids)

    def shards(folder: Path) -> None:
        samples = training_samples(data, config.data, tokenizers, voices, seed_of(seed, "shards"))
        skipped = write_shards(folder, samples, vocabulary, text, config.lm.seq_len)
        run.say(f"{skipped} samples longer than {config.lm.seq_len} ids left out")

    written = run.once("shards", shards)
    folder, _ = train_lm(run, config.lm, [written], vocabulary, text, tokenizers, seed, WEIGHTS)
    if config.practice.num:
        folder = practise(run, config.practice, config.lm, folder, written, WEIGHTS, seed)
    model = UnifiedModel.from_pretrained(folder)
    namer = None if naming is None else UnifiedModel.from_pretrained(naming)
    with torch.inference_mode():
        report, shown = evaluate_field(model, data, config.data, namer, seed=seed, say=run.say)
    with atomic_write(run.dir / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1))
    for path in (run.dir / "table.md", *([Path(config.table)] if config.table else [])):
        picture, page = path.with_name(f"{path.stem}_signs.png"), path.with_suffix("") / "index.html"
        write_image(picture, sheet(shown))
        players(page, model, shown)
        readers = 0 if phones is None else len(phones.clips)
        with atomic_write(path) as temporary:
            temporary.write_text(
                markdown(
                    report,
                    config.data,
                    picture.name,
                    f"{path.stem}/{page.name}",
                    readers,
                    practised=config.practice.num,
                )
            )
    return report
