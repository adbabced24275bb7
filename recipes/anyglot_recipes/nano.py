"""The `nano` recipe: from nothing to an any-to-any model of nanoworld, on a laptop.

world -> three tokenizers -> shards -> language model -> evaluation on held-out scenes. Everything is made on this
machine from a seed; every stage continues where it was killed (see `chain.py`). What the tasks are is in `tasks.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soxr

from anyglot_lm.parts import TEMPLATE_FILE, VOCABULARY_FILE
from anyglot_lm.segments import Sample, Template
from anyglot_lm.text import TextTokenizer
from anyglot_lm.unified import UnifiedModel
from anyglot_lm.vocabulary import Vocabulary
from anyglot_recipes import spoil
from anyglot_recipes.chain import (
    LM_STATE,
    LMConfig,
    Run,
    TokenizerConfig,
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
from anyglot_recipes.quiz import LOOK_UP, lookups, quiz
from anyglot_recipes.reading import TASKS as READINGS
from anyglot_recipes.reading import reading_samples, reading_strings
from anyglot_recipes.shots import RULES, Picture
from anyglot_recipes.tasks import EXTRA, MODALITIES, TASKS, TURNED, Item, sample
from anyglot_synth.nanoworld import language
from anyglot_synth.nanoworld.draw import draw
from anyglot_synth.nanoworld.records import Record, generate, spoken_sentences
from anyglot_synth.nanoworld.scene import Scene, Split, Thing, sample_scene
from anyglot_synth.nanoworld.voices import (
    ESPEAK_VOICES,
    MORE_ESPEAK_VOICES,
    SAMPLE_RATE,
    VOICES,
    SpeechCache,
    Voice,
    default_cache_dir,
    installed_voices,
)
from anyglot_tokenizers import load
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ASSISTANT_VOICE = VOICES[-1].name  # slt where flite speaks
NEVER_HEARD = ESPEAK_VOICES[-1]
"""The voice that is kept for the benchmark."""
IMAGE_SIZE = 64
SPEED = 1.18
"""Most that `another_speed` changes."""
TEMPLATE = Template(version=2)
"""Tells transcripts from answers (`tasks.CHAINS`)."""
PARTS = ("tokenizers/image", "tokenizers/speech", "tokenizers/music", "text")
"""What a run takes from its `start`, but for the weights."""
SHAPE = ("blocks", "text_vocab_size", "hidden_size", "num_layers", "num_heads", "tied", "qk_norm", "factored")
"""Settings of `LMConfig` that make the model."""
EVERYTHING = (*TASKS, *EXTRA, *READINGS, LOOK_UP)
"""What a shard may hold."""


@dataclass
class WorldConfig:
    """How much of nanoworld the language model sees.

    Args:
        num_chunks: shards; each is a unit of resuming.
        chunk: scenes per shard. Every scene gives one sample of every task.
        readings: strings of words per shard, written down and read aloud (`reading.py`).
        lookups: texts per shard that are asked about (`quiz.py`); of the recipe `nano` alone.
        varied: share of the user's recordings, also of those the codec learns from, whose speed and pitch are changed.
        guests: share of the user's descriptions, and words written down, that voices of another engine speak, where
            there is one (`guest_voices`). The codec does not learn from them.
        spoiled: share of what users show and say that is spoiled (`spoil.py`), all but the pictures of few-shot
            documents. The codecs do not learn from it.
        workers: processes that make media.
    """

    num_chunks: int = 10
    chunk: int = 1000
    readings: int = 400
    lookups: int = 0
    varied: float = 0.5
    guests: float = 0.4
    spoiled: float = 0.0
    workers: int = 2

    def check(self) -> None:
        """Raises `ManifestError`: a share that is none, or a count that is too low."""
        shares = {name: getattr(self, name) for name in ("varied", "guests", "spoiled")}
        if not all(0 <= share <= 1 for share in shares.values()):
            said = ", ".join(f"world.{name} {share}" for name, share in shares.items())
            raise ManifestError(f"{said} must lie in 0..1")
        if min(self.num_chunks, self.chunk) < 1:
            raise ManifestError(f"world.num_chunks {self.num_chunks} and world.chunk {self.chunk} must be 1 or more")
        if min(self.readings, self.lookups) < 0:
            raise ManifestError(f"world.readings {self.readings} and world.lookups {self.lookups} must be 0 or more")


@dataclass
class EvalConfig:
    """How the trained model is graded.

    Args:
        n: held-out scenes per task; 0 skips the evaluation.
    """

    n: int = 50


@dataclass
class NanoConfig:
    """The nano recipe.

    Args:
        run_dir: everything is written below; run again with the same folder to continue.
        seed: of all randomness.
        start: run folder of this recipe whose model is trained on: its tokenizers, its text tokenizer and its weights
            are taken, so `image`, `speech` and `music` say nothing. Another `seed` gives other scenes. A folder of its
            model alone, such as the shipped one, has plain rows in half precision: `lm.factored` must then be false.
        tokenizers: run or model folder of this recipe whose tokenizers alone are taken; the language model is new.
        world: how much data.
        shares: weight of each task in the training's ids, of `tasks.TASKS`, `tasks.EXTRA`, `reading.TASKS` and
            `quiz.LOOK_UP`; 1 where not named, but 0 for `tasks.TURNED`.
        image: image tokenizer.
        speech: speech codec.
        music: music codec.
        lm: language model.
        eval: evaluation at the end.
    """

    run_dir: str = "runs/nano"
    seed: int = 0
    start: str | None = None
    tokenizers: str | None = None
    world: WorldConfig = field(default_factory=WorldConfig)
    shares: dict[str, float] = field(default_factory=dict)
    image: TokenizerConfig = field(default_factory=TokenizerConfig)
    speech: TokenizerConfig = field(default_factory=TokenizerConfig)
    music: TokenizerConfig = field(default_factory=TokenizerConfig)
    lm: LMConfig = field(default_factory=LMConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def nano(config: NanoConfig) -> dict[str, Any]:
    """Train the nanoworld model.

    Returns:
        The benchmark's report, with the final training loss as "loss".
    """
    seed, world, lm = config.seed, config.world, config.lm
    trained = None if config.start is None else Path(config.start)
    alone = trained is not None and (trained / "config.json").is_file()
    check_lm(lm, new=not alone, modalities=MODALITIES[1:])
    if trained is not None and config.tokenizers is not None:
        raise ManifestError(f"start {config.start} has tokenizers of its own: leave tokenizers {config.tokenizers} out")
    unknown = config.shares.keys() - set(EVERYTHING)
    if unknown:
        raise ManifestError(f"shares: no task {', '.join(sorted(unknown))}; there are {', '.join(EVERYTHING)}")
    world.check()
    if min(config.shares.values(), default=0.0) < 0:
        raise ManifestError(f"shares {config.shares}: there must be no share below 0")
    learnt = (*TASKS, *(task for task in EXTRA if task not in TURNED or config.shares.get(task)))
    tasks = (*learnt, *(READINGS if world.readings else ()), *((LOOK_UP,) if world.lookups else ()))
    idle = [task for task, share in config.shares.items() if share and task not in tasks]
    if idle:
        raise ManifestError(
            f"shares: nothing is made for {', '.join(idle)}; give world.readings and world.lookups, or a share of 0"
        )
    new = {name: new_tokenizer(name, getattr(config, name), seed) for name in MODALITIES[1:]}
    if trained is None and config.tokenizers is None:
        lm_blocks(new, lm, {})  # both only to check settings before any work
    settings = {k: v for k, v in vars(config).items() if k not in ("run_dir", "eval", "tokenizers")}
    taken = trained
    if trained is not None:
        settings["start"] = weights_of(trained, lm) if alone else plan_of(trained, lm)
    elif config.tokenizers is not None:
        taken = Path(config.tokenizers)
        settings["tokenizers"] = tokenizers_of(taken)
    run = Run(config.run_dir, settings)
    if taken is not None:
        for name in PARTS:
            run.once(name, partial(_take, taken, name))
    cache = SpeechCache(default_cache_dir(), world.workers)
    made = cache.prefetch(spoken_sentences())  # what guests say is spoken when it is needed
    run.say(f"voices: {made} clips spoken, the rest were cached")
    tokenizers = {
        "image": train_tokenizer(run, "image", config.image, lambda: images(config.image.num, seed), seed),
        "speech": train_tokenizer(
            run,
            "speech",
            config.speech,
            lambda: _audio("speech", config.speech.num, seed, world.workers, world.varied),
            seed,
        ),
        "music": train_tokenizer(
            run, "music", config.music, lambda: _audio("music", config.music.num, seed, world.workers), seed
        ),
    }
    text = TextTokenizer.load(
        run.once("text", lambda folder: _train_text(folder, lm.text_vocab_size, seed)) / "text.model"
    )
    grid = (IMAGE_SIZE // tokenizers["image"].spec.downsample_factor,) * 2
    vocabulary = build_vocabulary(text, tokenizers, lm, grid)
    if alone and trained is not None:
        check_writes(trained, vocabulary)
    shards, user_side = [], (world.workers, world.varied, world.guests, world.spoiled)
    for index in range(world.num_chunks):

        def make(folder: Path, index: int = index) -> None:
            chunk_seed = seed_of(seed, "chunk", index) % 2**31
            items = make_items("train", world.chunk, chunk_seed, tokenizers, cache, *user_side)
            read = readings(world, chunk_seed, tokenizers["speech"], cache)
            samples = chain(_samples(items, learnt, chunk_seed), read, lookups(world.lookups, chunk_seed))
            skipped = write_shards(folder, samples, vocabulary, text, lm.seq_len, TEMPLATE)
            run.say(f"shard {index}: {skipped} samples longer than {lm.seq_len} ids left out")

        shards.append(run.once(f"shards/{index:05d}", make))
    shares = {task: config.shares.get(task, 1.0) for task in tasks}
    how: dict[str, Any] = {"template": TEMPLATE}
    if trained is not None:
        how |= {"start": partial(_model_of, trained)} if alone else {"trained": trained}
    folder, loss = train_lm(run, lm, shards, vocabulary, text, tokenizers, seed, shares, **how)
    report: dict[str, Any] = {}
    if config.eval.n:
        from anyglot_recipes.evaluate import evaluate

        model = UnifiedModel.from_pretrained(folder)
        items = test_items(model, config.eval.n, seed)
        report = evaluate(model, items, progress=run.say)
        with atomic_write(run.dir / "report.json") as path:
            path.write_text(json.dumps(report, indent=1))
        run.say(f"mean over the 12 pairs {report['mean']}")
    return {**report, "loss": loss}


def plan_of(start: Path, lm: LMConfig) -> str:
    """The fingerprint of the plan that a run of this recipe was trained by.

    Raises:
        ManifestError: it is not done, or its model is another one than `lm` describes.
    """
    try:
        plan: str = json.loads((start / "model" / "training.json").read_text())["plan"]
        theirs = json.loads((start / "settings.json").read_text())["lm"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"start: {start} holds no run of nano that is done ({error!r})") from error
    missing = [name for name in (*PARTS, str(LM_STATE)) if not (start / name).exists()]
    if missing:
        raise ManifestError(f"start: {start} has no {', '.join(missing)}; give the whole run folder")
    ours = json.loads(json.dumps(asdict(lm)))
    changed = [f"lm.{key}: {theirs.get(key)} there, {ours[key]} here" for key in SHAPE if theirs.get(key) != ours[key]]
    if changed:
        raise ManifestError(f"start: {start} trained another model ({'; '.join(changed)}); give its settings")
    return plan


def weights_of(start: Path, lm: LMConfig) -> str:
    """sha256 of the weights of a model folder.

    Raises:
        ManifestError: it lacks a part of a model of this recipe, or is another model than `lm` describes.
    """
    missing = [
        name for name in (*PARTS[:-1], TextTokenizer.file_name, "model.safetensors") if not (start / name).exists()
    ]
    if missing:
        raise ManifestError(f"start: {start} has no {', '.join(missing)}; give a whole model folder of this recipe")
    try:
        theirs = json.loads((start / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ManifestError(f"start: {start} holds no model ({error}); copy the whole folder again") from error
    pairs = {
        "hidden_size": theirs.get("hidden_size"),
        "num_layers": theirs.get("num_hidden_layers"),
        "num_heads": theirs.get("num_attention_heads"),
        "tied": theirs.get("tie_word_embeddings"),
        "qk_norm": theirs.get("model_type") == "qwen3",
    }
    ours = asdict(lm)
    changed = [f"lm.{key}: {value} there, {ours[key]} here" for key, value in pairs.items() if value != ours[key]]
    if changed:
        raise ManifestError(f"start: {start} is another model ({'; '.join(changed)}); give its settings")
    return hashlib.sha256((start / "model.safetensors").read_bytes()).hexdigest()


def tokenizers_of(folder: Path) -> list[str]:
    """Fingerprints of the tokenizers of a run or model folder, those of media first.

    Raises ManifestError when one is missing.
    """
    text = (folder / "text" if (folder / "text").is_dir() else folder) / TextTokenizer.file_name
    missing = [str(path) for path in (*(folder / name for name in PARTS[:-1]), text) if not path.exists()]
    if missing:
        raise ManifestError(f"tokenizers: there is no {', '.join(missing)}; give a run or model folder of nano")
    return [*(load(folder / name).fingerprint for name in PARTS[:-1]), TextTokenizer.load(text).fingerprint]


def _take(start: Path, name: str, folder: Path) -> None:
    """One of `PARTS` out of a run folder or a model folder."""
    if name == "text" and not (start / name).is_dir():
        shutil.copy(start / TextTokenizer.file_name, folder)
    else:
        shutil.copytree(start / name, folder, dirs_exist_ok=True)


def check_writes(start: Path, vocabulary: Vocabulary) -> None:
    """Raises ManifestError unless a model folder has this vocabulary and the recipe's template."""
    theirs = Vocabulary.load(start / VOCABULARY_FILE).fingerprint
    if theirs != vocabulary.fingerprint or Template.load(start / TEMPLATE_FILE) != TEMPLATE:
        raise ManifestError(f"start: {start} writes media otherwise than lm.blocks say; give its settings")


def _model_of(start: Path) -> PreTrainedModel:
    return UnifiedModel.from_pretrained(start).model


def images(num: int, seed: int) -> np.ndarray:
    """uint8 [num, 64, 64, 3] pictures of training scenes."""
    rng = np.random.default_rng(seed_of(seed, "pictures"))
    return np.stack([draw(sample_scene(rng, "train"), rng, IMAGE_SIZE) for _ in range(num)])


def _audio(part: str, num: int, seed: int, workers: int, varied: float = 0.0) -> list[np.ndarray]:
    records = generate("train", num, seed_of(seed, part) % 2**31, workers=workers, parts=[part])
    rng = np.random.default_rng(seed_of(seed, part, "varied"))
    return [another_speed(getattr(record, part), rng, varied) for record in records]


def another_speed(audio: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """Speech `[samples]` played slower and lower or faster and higher by up to `SPEED`, for training: more speakers.

    With the chance `share`, else as it is (speed perturbation, Ko et al. 2015).
    """
    if rng.random() >= share:
        return audio
    changed: np.ndarray = soxr.resample(audio, SAMPLE_RATE * float(rng.uniform(1 / SPEED, SPEED)), SAMPLE_RATE)
    return changed.astype(np.float32)


def guest_voices() -> tuple[Voice, ...]:
    """Voices of another engine than the world's on this machine, but for `NEVER_HEARD`; none where there is one."""
    others = tuple(voice for voice in installed_voices() if voice not in VOICES and voice != NEVER_HEARD)
    return (*others, *MORE_ESPEAK_VOICES) if others else ()


def _train_text(folder: Path, vocab_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed_of(seed, "text"))
    lines = []
    for _ in range(4000):
        scene = sample_scene(rng, "train")
        lines += [language.describe(scene, rng), *language.question(scene, rng), language.edit(scene, rng)[0]]
        lines += language.presence(scene, rng, present=bool(rng.integers(2)))
    lines += reading_strings(2000, rng)
    TextTokenizer.train(lines, folder / "text.model", vocab_size=vocab_size)


def pictures(split: Split, num: int, seed: int, tokenizer: Tokenizer) -> list[Picture]:
    """`num` pictures of one thing each."""
    rng = np.random.default_rng([seed, 83])
    things: list[Thing] = []
    while len(things) < num:
        scene = sample_scene(rng, split)
        things += scene.things if len(scene) == 1 else ()
    codes = encode_images(tokenizer, np.stack([draw(Scene((thing,)), rng, IMAGE_SIZE) for thing in things]))
    return list(zip(things, codes, strict=True))


def written_questions(scenes: list[Scene], rng: np.random.Generator) -> list[tuple[str, str]]:
    """A question and its answer for each scene: every other one about presence, yes and no alike, half of them hard."""
    return [
        language.presence(scene, rng, present=i % 4 == 1, hard=i % 8 > 3) if i % 2 else language.question(scene, rng)
        for i, scene in enumerate(scenes)
    ]


def make_items(
    split: Split,
    num: int,
    seed: int,
    tokenizers: dict[str, Tokenizer],
    cache: SpeechCache,
    workers: int,
    varied: float = 0.0,
    guests: float = 0.0,
    spoiled: float = 0.0,
) -> list[Item]:
    """`num` scenes with all their media as codes, questions, answers, edits and few-shot pictures included.

    `varied`, `guests` and `spoiled` are as in `WorldConfig`. Examples of few-shot documents are of the training split,
    their rules are those of training, and their pictures are never spoiled.
    """
    records = list(generate(split, num, seed, workers=workers))
    rng = np.random.default_rng([seed, 77])
    asked = [language.question(record.scene, rng) for record in records]
    edits = [language.edit(record.scene, rng) for record in records]
    said = [language.describe(record.scene, rng, style="spoken") for record in records]
    speech = tokenizers["speech"]
    speeds = np.random.default_rng([seed, 86])
    spoils = np.random.default_rng([seed, 94])

    def recorded(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        audio = another_speed(audio, rng, varied)
        return spoil.sound(audio, spoils) if spoils.random() < spoiled else audio

    spoken = descriptions(records, cache, guests, np.random.default_rng([seed, 89]))
    heard = encode_audio(speech, [recorded(audio, speeds) for audio in spoken])
    replies = encode_audio(speech, [cache.say(text, ASSISTANT_VOICE) for text in said])
    spoken_questions = [cache.say(q, r.voice) for (q, _), r in zip(asked, records, strict=True)]
    questions = encode_audio(speech, [recorded(audio, speeds) for audio in spoken_questions])
    answers = encode_audio(speech, [cache.say(a, ASSISTANT_VOICE) for _, a in asked])
    music = encode_audio(tokenizers["music"], [record.music for record in records])
    drawn = encode_images(tokenizers["image"], np.stack([record.image for record in records]))
    seen = _seen(records, tokenizers, spoiled, spoils)
    edited = encode_images(tokenizers["image"], np.stack([draw(scene, rng, IMAGE_SIZE) for _, scene in edits]))
    more = np.random.default_rng([seed, 85])  # what came later must not change what was drawn before
    written = written_questions([record.scene for record in records], more)
    seconds = [_another_question(record.scene, q, more) for record, (q, _) in zip(records, asked, strict=True)]
    speeds_again = np.random.default_rng([seed, 90])
    asked_again = [cache.say(q, r.voice) for (q, _), r in zip(seconds, records, strict=True)]
    second_questions = encode_audio(speech, [recorded(audio, speeds_again) for audio in asked_again])
    second_answers = encode_audio(speech, [cache.say(a, ASSISTANT_VOICE) for _, a in seconds])
    quizzes = np.random.default_rng([seed, 92])
    examples = pictures("train", num + 1, seed, tokenizers["image"])  # two at least
    shown = pictures(split, num, seed + 1, tokenizers["image"])
    return [
        Item(
            scene=record.scene,
            text=record.text,
            codes={"image": drawn[i], "speech": heard[i], "reply": replies[i], "music": music[i]},
            seen=seen[i],
            reply=said[i],
            question=asked[i][0],
            answer=asked[i][1],
            question_speech=questions[i],
            answer_speech=answers[i],
            instruction=edits[i][0],
            edited=edits[i][1],
            edited_image=edited[i],
            written_question=written[i][0],
            written_answer=written[i][1],
            second_question=seconds[i][0],
            second_answer=seconds[i][1],
            second_question_speech=second_questions[i],
            second_answer_speech=second_answers[i],
            shown=[*(examples[j] for j in more.choice(num + 1, size=2, replace=False)), shown[i]],
            rule=RULES[int(more.integers(len(RULES)))],
            quiz=quiz(record.scene, quizzes),
        )
        for i, record in enumerate(records)
    ]


def _seen(
    records: list[Record], tokenizers: dict[str, Tokenizer], share: float, rng: np.random.Generator
) -> list[dict[str, np.ndarray]]:
    """Of each record, the codes of its picture and melody that were spoiled; `share` of either are."""
    seen: list[dict[str, np.ndarray]] = [{} for _ in records]
    pictures, melodies = (np.flatnonzero(rng.random(len(records)) < share) for _ in range(2))
    if len(pictures):
        drawn = np.stack([spoil.picture(records[i].scene, rng) for i in pictures])
        for i, codes in zip(pictures, encode_images(tokenizers["image"], drawn), strict=True):
            seen[i]["image"] = codes
    played = encode_audio(tokenizers["music"], [spoil.melody(records[i].music, rng) for i in melodies])
    for i, codes in zip(melodies, played, strict=True):
        seen[i]["music"] = codes
    return seen


def descriptions(
    records: list[Record], cache: SpeechCache, share: float, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """What the users say, `share` of it spoken by guests."""
    guests = guest_voices() if share else ()
    chosen = [guests[int(rng.integers(len(guests)))] if rng.random() < share and guests else None for _ in records]
    cache.prefetch_said(
        (record.spoken_text, voice) for record, voice in zip(records, chosen, strict=True) if voice is not None
    )
    for record, voice in zip(records, chosen, strict=True):
        yield cache.say(record.spoken_text, voice) if voice else record.speech


def readings(world: WorldConfig, seed: int, speech: Tokenizer, cache: SpeechCache) -> Iterator[tuple[str, Sample]]:
    """The words of one shard that are written down and read aloud (`reading.py`), in all voices of the training."""
    voices = (*VOICES, *(guest_voices() if world.guests else ()))
    speeds, spoils = np.random.default_rng([seed, 91]), np.random.default_rng([seed, 95])

    def vary(audio: np.ndarray) -> np.ndarray:
        audio = another_speed(audio, speeds, world.varied)
        return spoil.sound(audio, spoils) if spoils.random() < world.spoiled else audio

    return reading_samples(world.readings, seed, speech, cache, voices, ASSISTANT_VOICE, vary)


def _another_question(scene: Scene, first: str, rng: np.random.Generator) -> tuple[str, str]:
    while True:
        second = language.question(scene, rng)
        if second[0] != first:
            return second


def world_seed(seed: int, split: Split) -> int:
    """The seed of the records that a benchmark of this seed is about. Those of "train" are none of a training's."""
    return seed_of(seed, "test" if split == "test" else "fresh") % 2**31


def test_items(model: UnifiedModel, n: int, seed: int = 0, split: Split = "test") -> list[Item]:
    """`n` items with codes made by the model's own tokenizers; held-out ones, or fresh ones of the training split.

    Raises ManifestError for a model without image, speech or music, or whose codecs are of another rate.
    """
    missing = [m for m in ("image", "speech", "music") if m not in model.tokenizers]
    if missing:
        raise ManifestError(
            f"the nanoworld benchmark needs a model with {', '.join(missing)}; this one has "
            f"{', '.join(model.vocabulary.modalities)}"
        )
    for name in ("speech", "music"):
        if (rate := model.tokenizers[name].spec.sample_rate) != SAMPLE_RATE:
            raise ManifestError(
                f"the nanoworld benchmark is of {SAMPLE_RATE} Hz; the tokenizer of {name} takes {rate} Hz"
            )
    cache = SpeechCache(default_cache_dir())
    return make_items(split, n, world_seed(seed, split), dict(model.tokenizers), cache, 1)


def _samples(items: list[Item], tasks: Sequence[str], seed: int) -> Iterator[tuple[str, Sample]]:
    rng = np.random.default_rng([seed, 78])
    for item in items:
        for task in tasks:
            yield task, sample(item, task, rng)
