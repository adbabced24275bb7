"""The nano recipe's words read aloud never hold a held-out combination; its settings are checked before any work."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from anyglot_recipes.chain import build_tokenizer
from anyglot_recipes.cli import main
from anyglot_recipes.nano import SPEED, another_speed
from anyglot_recipes.reading import FOREIGN, MOST_WORDS, reading_pairs, reading_strings
from anyglot_synth.nanoworld.language import CLAUSES, JOINERS, NUMBERS, WORDS
from anyglot_synth.nanoworld.scene import HELD_OUT
from anyglot_tokenizers.errors import ManifestError


def test_no_string_holds_a_held_out_combination() -> None:
    strings = reading_strings(8000, np.random.default_rng(0))
    words = [re.findall(r"[a-z]+", string) for string in strings]
    assert not any(set(triple) <= set(found) for found in words for triple in HELD_OUT)
    assert all(2 <= len(found) <= MOST_WORDS and set(found) <= {*WORDS, *NUMBERS} for found in words[1::2])
    assert len(set(strings)) > 6000
    foreign = {word for kind in FOREIGN.values() for word in kind}
    assert not foreign & {*WORDS, *NUMBERS} and all(len(found) in (5, 10) for found in words[::2])
    assert all(foreign & set(found[:5]) and foreign & set(found[-5:]) for found in words[::2])
    assert foreign <= {word for found in words[::2] for word in found}


def test_a_sentence_has_the_words_that_are_said() -> None:
    pairs = reading_pairs(400, np.random.default_rng(0))
    fillers = set(re.findall(r"[a-z]+", " ".join(CLAUSES + sum(JOINERS, ())))) - {"thing", "place"}
    for written, spoken in pairs[::2]:
        kept = [word for word in re.findall(r"[a-z]+", written) if word not in fillers]
        for i in range(0, len(kept), 5):  # things are said in the order in which they are written, each in any order
            assert sorted(kept[i : i + 5]) == sorted(re.findall(r"[a-z]+", spoken)[i : i + 5])
    assert len({spoken for _, spoken in pairs[::2]} & {written for written, _ in pairs[::2]}) == 0
    assert all(written == spoken for written, spoken in pairs[1::2])
    assert reading_strings(400, np.random.default_rng(0)) == [spoken for _, spoken in pairs]


def test_what_follows_small_red_is_open() -> None:
    strings = reading_strings(8000, np.random.default_rng(0))
    after = Counter(match[1] for string in strings if (match := re.search("small red ([a-z]+)", string)))
    assert "circle" not in after and len(after) > 20 and max(after.values()) < 0.3 * sum(after.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--shares={dreams: 1}", "no task dreams"),
        ("--shares={chat: -1}", "no share below 0"),
        ("--shares={look up: 1}", "nothing is made for look up; give world.readings and world.lookups"),
        ("--world.varied=1.5", "must lie in 0..1"),
        ("--world.guests=-1", "must lie in 0..1"),
        ("--world.spoiled=1.5", "must lie in 0..1"),
        ("--world.num_chunks=0", "must be 1 or more"),
        ("--world.chunk=0", "must be 1 or more"),
        ("--world.lookups=-1", "must be 0 or more"),
        ("--lm.condition_dropout=1", "must be a share below 1"),
        ("--lm.history_noise={smell: 0.3}", "history_noise: no modality 'smell' with codes; there are image"),
        ("--lm.codebook_rows=true", "leave lm.codebook_rows out"),
        ("--image.model={patch: 3}", "image.model: patch 3 and 2 stages"),
        ("--speech.tokenizer=nowhere:Codec", "speech.tokenizer: No module named 'nowhere'"),
        ("--music.model={stride: 5, strides: 3}", "music.model: "),
    ],
)
def test_settings_that_make_no_sense(
    given: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "nano", "--run_dir", str(tmp_path / "run"), given]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_another_speed() -> None:
    audio = np.sin(2 * np.pi * 200 * np.arange(16000) / 16000).astype(np.float32)
    rng = np.random.default_rng(0)
    assert another_speed(audio, rng, 0.0) is audio
    for _ in range(5):
        changed = another_speed(audio, rng, 1.0)
        ratio = len(changed) / len(audio)
        pitch = np.abs(np.fft.rfft(changed)).argmax() * 16000 / len(changed)
        assert 1 / SPEED - 0.01 <= ratio <= SPEED + 0.01 and abs(pitch * ratio / 200 - 1) < 0.02


@pytest.mark.parametrize(
    "named", [":ImageVQ", "anyglot_tokenizers.image:decoder_of", "anyglot_tokenizers.image:GridImage"]
)
def test_what_is_no_tokenizer(named: str) -> None:
    with pytest.raises(ManifestError, match="image.tokenizer: "):
        build_tokenizer(named, {}, "image.")
