"""Models of transformers as voices: tiny random ones, written and loaded as real ones are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from anyglot_synth.backends import BackendError
from anyglot_synth.voices.hf import HFVoice

transformers = pytest.importorskip("transformers")
LETTERS = "abcdefghijklmnopqrstuvwxyz '-"
TEXT = "a large red circle"


@pytest.fixture(scope="module")
def vits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vits")
    config = transformers.VitsConfig(
        vocab_size=len(LETTERS) + 1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
        flow_size=16, spectrogram_bins=17, upsample_initial_channel=16, upsample_rates=[8, 8], num_speakers=2,
        upsample_kernel_sizes=[16, 16], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]],
        posterior_encoder_num_wavenet_layers=1, prior_encoder_num_flows=1, prior_encoder_num_wavenet_layers=1,
        duration_predictor_num_flows=2, duration_predictor_filter_channels=16, speaker_embedding_size=4,
        sampling_rate=16_000, wavenet_dropout=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.VitsModel(config)
    model.save_pretrained(folder)
    vocabulary = {letter: number for number, letter in enumerate(["_", *LETTERS])}
    (folder / "letters.json").write_text(json.dumps(vocabulary))
    tokenizer = transformers.VitsTokenizer(str(folder / "letters.json"), pad_token="_", unk_token="_", phonemize=False)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    return folder


@pytest.fixture(scope="module")
def speecht5(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    import sentencepiece

    folder = tmp_path_factory.mktemp("speecht5")
    model, vocoder, speakers = folder / "model", folder / "vocoder", folder / "speakers"
    model.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([LETTERS] * 20), model_prefix=str(model / "spm_char"), model_type="char", vocab_size=32,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    transformers.SpeechT5Tokenizer(str(model / "spm_char.model")).save_pretrained(model)
    config = transformers.SpeechT5Config(
        vocab_size=81, hidden_size=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, speech_decoder_prenet_units=16,
        speech_decoder_postnet_units=16, speech_decoder_postnet_layers=1, speaker_embedding_dim=8,
    )  # fmt: skip
    hifi_gan = transformers.SpeechT5HifiGanConfig(
        upsample_initial_channel=16, upsample_rates=[16, 16], upsample_kernel_sizes=[32, 32],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for made, where in (
            (transformers.SpeechT5ForTextToSpeech(config), model),
            (transformers.SpeechT5HifiGan(hifi_gan), vocoder),
        ):
            for weights in made.parameters():  # as they are drawn they give silence
                torch.nn.init.normal_(weights, std=0.3)
            made.save_pretrained(where)
    speakers.mkdir()
    for number, name in enumerate(("anna", "bert")):
        np.save(speakers / f"{name}.npy", np.random.default_rng(number).standard_normal(8))
    return {"model": str(model), "vocoder": str(vocoder), "speakers": str(speakers)}


def check(voices: HFVoice, names: list[str]) -> None:
    voices.setup()
    assert [v["voice"] for v in voices.styles()] == names and voices.seeded
    state = torch.get_rng_state()
    first = voices.make(TEXT, {"voice": names[0]}, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert first.array.dtype == np.float32 and first.array.ndim == 1 and first.sample_rate == 16_000
    assert np.array_equal(first.array, voices.make(TEXT, {"voice": names[0]}, 1).array)
    for voice, seed in ((names[0], 2), (names[1], 1)):
        assert not np.array_equal(first.array, voices.make(TEXT, {"voice": voice}, seed).array)
    with pytest.raises(BackendError, match="has no voice 'nobody'"):
        voices.make(TEXT, {"voice": "nobody"}, 0)


def test_vits(vits: Path) -> None:
    voices = HFVoice(str(vits), language="en")
    check(voices, ["0", "1"])
    assert voices.licence == "cc-by-nc-4.0" and voices.styles()[0]["language"] == "en"
    length = len(voices.make(TEXT, {"voice": "0"}, 1).array)
    assert len(voices.make(TEXT, {"voice": "0", "rate": 0.5}, 1).array) > 1.3 * length
    with pytest.raises(BackendError, match="knows no character"):
        voices.make("你好", {"voice": "0"}, 0)


def test_speecht5(speecht5: dict[str, str]) -> None:
    voices = HFVoice(**speecht5)
    check(voices, ["anna", "bert"])
    with pytest.raises(BackendError, match="own pace only"):
        voices.make(TEXT, {"voice": "anna", "rate": 1.2}, 0)
    np.save(Path(speecht5["speakers"]) / "short.npy", np.zeros(3))
    try:
        with pytest.raises(BackendError, match="3 numbers, the model takes 8"):
            HFVoice(**speecht5).setup()
    finally:
        (Path(speecht5["speakers"]) / "short.npy").unlink()


def test_identity_is_that_of_the_files(vits: Path, speecht5: dict[str, str], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in vits.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    one, two = HFVoice(str(vits)), HFVoice(str(copy))
    style = {"voice": "0"}
    assert one.key(TEXT, style, 0) == two.key(TEXT, style, 0) != one.key(TEXT, style, 1)
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    assert HFVoice(str(copy)).key(TEXT, style, 0) != one.key(TEXT, style, 0)
    assert set(HFVoice(**speecht5).identity()) == {"engine", "version", "model", "weights", "vocoder", "speakers"}


def test_folders_that_are_no_model(vits: Path, speecht5: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="give the folder of a downloaded model"):
        HFVoice(str(tmp_path / "none")).setup()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BackendError, match="of type 'llama'"):
        HFVoice(str(tmp_path)).setup()
    with pytest.raises(BackendError, match="needs `vocoder` and `speakers`"):
        HFVoice(speecht5["model"]).setup()
    for name in ("config.json", "vocab.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((vits / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((vits / "model.safetensors").read_bytes()[:900])
    with pytest.raises(BackendError, match="cannot be loaded") as caught:
        HFVoice(str(tmp_path)).setup()
    assert "\n" not in str(caught.value)
