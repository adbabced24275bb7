"""The `nano_chat` recipe: spoken questions about pictures, answered directly or by way of text.

scenes -> spoken questions and answers -> one training for each form, all from the same start, on the same questions and
for the same steps -> held-out scenes, graded by ear. In the form `direct` the answer is speech alone; in `chain` it is
what was heard in writing, the answer in writing, and the answer's speech (`grammar.CHAIN`); `both` trains on either.
What knows chains is graded in either. Every stage continues where it was killed (see `chain.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anyglot_lm.segments import Template
from anyglot_lm.unified import Output, UnifiedModel
from anyglot_recipes.chain import (
    LMConfig,
    Run,
    check_lm,
    encode_audio,
    encode_images,
    seed_of,
    train_lm,
    write_shards,
)
from anyglot_recipes.nano import ASSISTANT_VOICE, IMAGE_SIZE
from anyglot_recipes.shipped import NANO
from anyglot_recipes.tasks import CHAINED, SPOKEN, Item, sample
from anyglot_synth.nanoworld.draw import draw
from anyglot_synth.nanoworld.language import question, same_answer, words
from anyglot_synth.nanoworld.scene import Split, sample_scene
from anyglot_synth.nanoworld.voices import VOICES, SpeechCache, default_cache_dir
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.tokenizer import Tokenizer

TEMPLATE = Template(version=2)
"""Tells the transcript from the answer."""
FORMS = {"direct": (SPOKEN,), "chain": (CHAINED,), "both": (SPOKEN, CHAINED)}
"""What a form is trained on."""


@dataclass
class NanoChatConfig:
    """The nano_chat recipe.

    Args:
        run_dir: everything is written below; run again with the same folder to continue.
        seed: of all randomness.
        model: folder of a model of nanoworld, default the shipped one.
        forms: "direct", "chain", "both": each is a training of its own.
        scenes: training scenes.
        questions: spoken questions about each of them.
        lm: schedule; its sizes and blocks are the model's own and not read.
        n: held-out scenes with a question each.
    """

    run_dir: str = "runs/nano_chat"
    seed: int = 0
    model: str = str(NANO)
    forms: list[str] = field(default_factory=lambda: ["direct", "chain"])
    scenes: int = 3000
    questions: int = 4
    lm: LMConfig = field(default_factory=LMConfig)
    n: int = 1000


def nano_chat(config: NanoChatConfig) -> dict[str, Any]:
    """Train and grade.

    Returns:
        "rows": for the start ("before") and every form, in every way it can answer, what `grade_answers` gives, with
        "chance" (another question's answer) and "ceiling" (the true answer through the tokenizer); "models": folders.

    Raises:
        ManifestError: settings that cannot work.
    """
    unknown = set(config.forms) - set(FORMS)
    if unknown or not config.forms or min(config.scenes, config.questions, config.n) < 1:
        raise ManifestError(
            f"nano_chat: forms {config.forms} must be some of {', '.join(FORMS)}, and scenes, questions and n positive"
        )
    check_lm(config.lm, new=False)
    start = UnifiedModel.from_pretrained(config.model)
    data = {name: getattr(config, name) for name in ("seed", "model", "scenes", "questions")}
    length = {} if config.lm.seq_len == LMConfig.seq_len else {"lm.seq_len": config.lm.seq_len}
    run = Run(config.run_dir, data | length)  # what is longer is left out; runs of before have the default

    def make_shards(folder: Path) -> None:
        seed = seed_of(config.seed, "asked") % 2**31
        items = question_items("train", config.scenes, config.questions, seed, start.tokenizers)
        for task, name in ((SPOKEN, "direct"), (CHAINED, "chain")):
            samples = ((task, sample(item, task)) for item in items)
            skipped = write_shards(
                folder / name, samples, start.vocabulary, start.text, config.lm.seq_len, template=TEMPLATE
            )
            run.say(f"{name}: {len(items) - skipped} samples, {skipped} longer than {config.lm.seq_len} ids left out")

    shards = run.once("shards", make_shards)
    items = question_items("test", config.n, 1, seed_of(config.seed, "asked, test") % 2**31, start.tokenizers)
    models = {"before": (Path(config.model), FORMS["direct"])}
    for form in config.forms:
        part = Run(run.dir / form, {**data, "form": form, "lm": config.lm})
        folder, _ = train_lm(
            part,
            config.lm,
            [shards / name for name in (("direct", "chain") if form == "both" else (form,))],
            start.vocabulary,
            start.text,
            dict(start.tokenizers),
            config.seed,
            start=lambda: UnifiedModel.from_pretrained(config.model).model,
            template=TEMPLATE,
        )
        models[form] = (folder, FORMS["both" if CHAINED in FORMS[form] else "direct"])
    report = {
        "rows": list(_grade(run, models, items)),
        "models": {name: str(folder) for name, (folder, _) in models.items()},
    }
    with atomic_write(run.dir / "report.json") as path:
        path.write_text(json.dumps(report, indent=1))
    return report


def question_items(
    split: Split,
    num: int,
    questions: int,
    seed: int,
    tokenizers: dict[str, Tokenizer],
) -> list[Item]:
    """`num` scenes with `questions` each, asked in any voice: pictures, questions and answers as codes, no more."""
    cache = SpeechCache(default_cache_dir())
    rng = np.random.default_rng([seed, 81])
    scenes = [sample_scene(rng, split) for _ in range(num)]
    pictures = encode_images(tokenizers["image"], np.stack([draw(scene, rng, IMAGE_SIZE) for scene in scenes]))
    asked = [(i, *question(scenes[i], rng), VOICES[int(rng.integers(len(VOICES)))].name) for i in range(num)
             for _ in range(questions)]  # fmt: skip
    clips = list({*((q, voice) for _, q, _, voice in asked), *((a, ASSISTANT_VOICE) for _, _, a, _ in asked)})
    codes = dict(zip(clips, encode_audio(tokenizers["speech"], [cache.say(*clip) for clip in clips]), strict=True))
    return [
        Item(
            scene=scenes[i],
            text="",
            codes={"image": pictures[i]},
            question=q,
            answer=a,
            question_speech=codes[q, voice],
            answer_speech=codes[a, ASSISTANT_VOICE],
        )
        for i, q, a, voice in asked
    ]


def grade_answers(items: Sequence[Item], outputs: Sequence[Sequence[Output]], checkers: Any) -> dict[str, Any]:
    """Shares of answers, 0 to 1.

    "score": the judge hears the true answer. Of chains also "heard": the transcript is the question, word by word;
    "text": the written answer is true; "said": the spoken answer is the written one. "kinds": the same by the first two
    words of the question.
    """
    said = [heard for heard, _ in checkers.read("speech", [answer[-1].media for answer in outputs])]
    marks = {"score": [same_answer(heard, item.answer) for heard, item in zip(said, items, strict=True)]}
    if len(outputs[0]) > 1:
        heard, text = ([answer[place].text or "" for answer in outputs] for place in (0, 1))
        marks["heard"] = [words(h) == words(item.question) for h, item in zip(heard, items, strict=True)]
        marks["text"] = [same_answer(t, item.answer) for t, item in zip(text, items, strict=True)]
        marks["said"] = [same_answer(t, s) for t, s in zip(text, said, strict=True)]
    kinds = np.array([" ".join(words(item.question)[:2]) for item in items])

    def shares(chosen: Any) -> dict[str, Any]:
        return {"n": int(chosen.sum()), **{m: round(float(np.mean(np.array(v)[chosen])), 4) for m, v in marks.items()}}

    return {**shares(kinds == kinds), "kinds": {str(kind): shares(kinds == kind) for kind in np.unique(kinds)}}


def _grade(run: Run, models: dict[str, tuple[Path, tuple[str, ...]]], items: list[Item]) -> Iterator[dict[str, Any]]:
    from anyglot_recipes.evaluate import Checkers, answer, chance

    checkers, limits = Checkers(), dict[str, Any]()
    for name, (folder, tasks) in models.items():
        model = UnifiedModel.from_pretrained(folder)
        limits = limits or {
            "chance": round(chance(items, SPOKEN), 4),
            "ceiling": round(_ceiling(model, items, checkers), 4),
        }
        for task in tasks:
            graded = grade_answers(items, answer(model, items, task), checkers)
            row = {"model": name, "form": "chain" if task == CHAINED else "direct", **graded, **limits}
            run.say(", ".join(f"{key} {value}" for key, value in row.items()))
            yield row


def _ceiling(model: UnifiedModel, items: Sequence[Item], checkers: Any) -> float:
    """The score of the true answers through the tokenizer."""
    quantizers = model.vocabulary.block("speech").num_quantizers
    answers = [item.answer_speech[:quantizers] for item in items if item.answer_speech is not None]
    heard = checkers.read("speech", model.decode_media("speech", answers))
    return float(np.mean([same_answer(h, item.answer) for (h, _), item in zip(heard, items, strict=True)]))
