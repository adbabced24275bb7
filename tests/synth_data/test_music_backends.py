"""Music by fluidsynth and MusicGen, through the ways that users take: real programs, real folders of weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from anyglot_synth.backends import BackendError, silent
from anyglot_synth.dialogue import Dialogue, Part, Turn
from anyglot_synth.illustrate import IllustrateStage
from anyglot_synth.music.midi import SOUND_FONTS, MidiMusic
from anyglot_synth.music.musicgen import MusicGen
from anyglot_synth.nanoworld.language import describe
from anyglot_synth.nanoworld.melody import Note, read_midi, scene_of, write_midi
from anyglot_synth.nanoworld.scene import sample_scene
from anyglot_synth.stages import Filtered, Item
from anyglot_synth.store import Store

HAS_FLUIDSYNTH = shutil.which("fluidsynth") and any(
    fonts for folder in SOUND_FONTS for fonts in Path(folder).glob("*.sf2")
)
with_fluidsynth = pytest.mark.skipif(not HAS_FLUIDSYNTH, reason="fluidsynth or a sound font is not installed")


def lowest(audio: np.ndarray, rate: int) -> float:
    """Frequency, Hz, of the lowest strong partial: the octave above may be as loud."""
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
    return float(np.fft.rfftfreq(len(audio), 1 / rate)[np.flatnonzero(spectrum > 0.4 * spectrum.max())[0]])


@with_fluidsynth
def test_notes_sound_at_their_pitch_and_time() -> None:
    backend = MidiMusic(sample_rate=22050)
    backend.setup()
    made = backend.make("", {"notes": [[0.0, 0.5, 72, "flute"], [0.6, 0.5, 60, "flute"]]}, 0)
    assert made.sample_rate == 22050 and made.array.dtype == np.float32 and made.array.ndim == 1
    assert not silent(made.array) and np.abs(made.array).max() <= 1
    first, second = made.array[: 22050 // 2], made.array[int(0.65 * 22050) : int(1.1 * 22050)]
    assert lowest(first, 22050) == pytest.approx(523.25, rel=0.02)
    assert lowest(second, 22050) == pytest.approx(261.63, rel=0.02)
    again = backend.make("", {"notes": [[0.0, 0.5, 72, "flute"], [0.6, 0.5, 60, "flute"]]}, 0)
    assert np.array_equal(made.array, again.array)


@with_fluidsynth
def test_descriptions_of_the_world_are_played(tmp_path: Path) -> None:
    scene = sample_scene(np.random.default_rng(4))
    item = Item(0, Dialogue((Turn("user", (Part("music", describe(scene)),)),), "test"))
    played = IllustrateStage(music={"engine": "midi"})(item, Store(tmp_path))
    media = played.dialogue.turns[0].parts[0].media
    assert played.status == "ok" and media and media.seconds and media.seconds > 2
    assert scene_of(read_midi(tmp_path / media.origin["midi"])) == scene
    assert "seed" not in media.origin, "fluidsynth plays the same each time"


@with_fluidsynth
def test_a_folder_of_tunes(tmp_path: Path) -> None:
    write_midi(tmp_path / "a.mid", [Note(0, 0.4, 60, "flute")])
    write_midi(tmp_path / "b.mid", [Note(0, 0.4, 72, "bell")])
    (tmp_path / "a.txt").write_text("a calm flute")
    (tmp_path / "b.txt").write_text("a bright bell")
    backend = MidiMusic(tmp_path, licence="CC0-1.0")
    made = backend.make("bright bell, please", {}, 0)
    assert made.notes["file"] == "b.mid" and made.midi == (tmp_path / "b.mid").read_bytes()
    with pytest.raises(Filtered):
        backend.make("heavy metal drums", {}, 0)


@with_fluidsynth
def test_a_midi_file_counts_by_what_is_in_it(tmp_path: Path) -> None:
    backend = MidiMusic()
    for name, pitch in (("a", 60), ("b", 60), ("c", 62)):
        write_midi(tmp_path / f"{name}.mid", [Note(0, 0.4, pitch, "flute")])
    a, b, c = (backend.key("", {"midi": str(tmp_path / f"{name}.mid")}, 0) for name in "abc")
    assert a == b != c
    assert not silent(backend.make("", {"midi": str(tmp_path / "a.mid")}, 0).array)
    (tmp_path / "d.mid").write_bytes(b"RIFF")
    with pytest.raises(BackendError, match="not a MIDI file"):
        backend.make("", {"midi": str(tmp_path / "d.mid")}, 0)
    with pytest.raises(BackendError, match="there is no such MIDI file"):
        backend.key("", {"midi": str(tmp_path / "e.mid")}, 0)


@with_fluidsynth
def test_the_identity_names_program_and_sound_font(tmp_path: Path) -> None:
    identity = MidiMusic().identity()
    assert identity["fluidsynth"][0].isdigit() and len(identity["sound_font"]) == 64
    assert MidiMusic(sample_rate=16000).identity() != identity
    with pytest.raises(BackendError, match=r"no\.sf2: there is no such sound font"):
        MidiMusic(sound_font=tmp_path / "no.sf2").setup()
    (tmp_path / "bad.sf2").write_bytes(b"nothing")
    with pytest.raises(BackendError, match=r"bad\.sf2: not a sound font"):
        MidiMusic(sound_font=tmp_path / "bad.sf2").setup()


@with_fluidsynth
def test_a_file_without_notes_is_refused(tmp_path: Path) -> None:
    write_midi(tmp_path / "empty.mid", [])
    with pytest.raises(BackendError, match="midi: silence; has the file notes"):
        MidiMusic().make("", {"midi": str(tmp_path / "empty.mid")}, 0)


def test_without_fluidsynth_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match="fluidsynth is not here; install it"):
        MidiMusic().setup()


@with_fluidsynth
def test_notes_that_are_none() -> None:
    for bad in ([[0.0]], [["x", 1, 60, "flute"]], [[0, 1, 60, "kazoo"]], 3):
        with pytest.raises(BackendError, match="notes are rows of start, length, pitch, instrument"):
            MidiMusic().make("", {"notes": bad}, 0)


@pytest.fixture(scope="module")
def musicgen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole MusicGen with random weights, tiny, saved as published ones are."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        EncodecConfig,
        MusicgenConfig,
        MusicgenDecoderConfig,
        MusicgenForConditionalGeneration,
        PreTrainedTokenizerFast,
        T5Config,
    )

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("musicgen")
    words = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", "slow", "piano", "music", "drums"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    text = T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    audio = EncodecConfig(
        sampling_rate=8000, hidden_size=16, num_filters=4, upsampling_ratios=[8, 5], codebook_size=32, codebook_dim=16,
        target_bandwidths=[2.0], num_lstm_layers=1, norm_type="weight_norm",
    )  # fmt: skip
    decoder = MusicgenDecoderConfig(
        vocab_size=32, max_position_embeddings=400, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2,
        hidden_size=16, num_codebooks=2, pad_token_id=32, bos_token_id=32,
    )  # fmt: skip
    config = MusicgenConfig(text_encoder=text.to_dict(), audio_encoder=audio.to_dict(), decoder=decoder.to_dict())
    model = MusicgenForConditionalGeneration(config)
    for layer in model.audio_encoder.quantizer.layers:
        layer.codebook.embed.normal_()  # zeros otherwise
    model.generation_config.decoder_start_token_id = 32
    model.generation_config.pad_token_id = 32
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_musicgen_from_a_folder(musicgen: Path) -> None:
    backend = MusicGen(musicgen, seconds=0.3)
    made = backend.make("slow piano music", {}, 1)
    assert made.sample_rate == 8000 and made.array.ndim == 1 and made.array.dtype == np.float32
    assert len(made.array) == pytest.approx(0.3 * 8000, rel=0.1)
    assert np.array_equal(backend.make("slow piano music", {}, 1).array, made.array), "a seed gives one sound"
    assert not np.array_equal(backend.make("slow piano music", {}, 2).array, made.array)
    assert len(backend.make("drums", {"seconds": 0.6}, 1).array) > 1.7 * len(made.array)
    assert MusicGen(musicgen).identity() == MusicGen(str(musicgen)).identity() != backend.identity()
    with pytest.raises(BackendError, match="too long"):
        backend.make("drums", {"seconds": 60}, 0)


@pytest.mark.slow
def test_musicgen_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="MusicGen does not load"):
        MusicGen(tmp_path).setup()
    with pytest.raises(BackendError, match="seconds 0"):
        MusicGen(tmp_path, seconds=0)
