from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from anyglot_lm.engine import GREEDY, Engine, Sampling
from anyglot_lm.grammar import Request
from anyglot_lm.model import new_llama
from anyglot_lm.segments import CHAT, Sample, Segment
from anyglot_lm.text import TextTokenizer
from anyglot_lm.unified import UnifiedModel
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_tokenizers.audio import AudioCodec
from anyglot_tokenizers.errors import CheckpointError, CodesError, FingerprintError, ManifestError
from anyglot_tokenizers.image import ImageVQ
from anyglot_tokenizers.media import write_audio, write_image

SAYINGS = ["a large red circle at the top left", "make the square blue", "two things: a star and a ring"]


def codec(modality: str, quantizers: int) -> AudioCodec:
    return AudioCodec(
        modality=modality,
        n_fft=320,
        hop=80,
        stride=2,
        num_mels=16,
        dim=16,
        encoder_depth=1,
        decoder_depth=1,
        num_quantizers=quantizers,
        codebook_size=16,
        codebook_dim=8,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    text = TextTokenizer.train(SAYINGS, vocab_size=300)
    image = ImageVQ(
        channels=(8,), patch=8, downsample_factor=8, num_quantizers=2, codebook_size=16, codebook_dim=8
    ).eval()
    speech, music = codec("speech", 3).eval(), codec("music", 2).eval()
    vocabulary = Vocabulary.build(
        text.size,
        BlockSpec.from_code_spec(image.spec, pattern="raster", grid=(2, 2)),
        BlockSpec.from_code_spec(speech.spec, num_quantizers=2, pattern="delay", input_pattern="first", max_frames=9),
        BlockSpec.from_code_spec(music.spec, max_frames=12),
        text_fingerprint=text.fingerprint,
    )
    llama = new_llama(vocabulary, hidden_size=32, num_layers=1, num_heads=2, max_length=160)
    tokenizers = {"image": image, "speech": speech, "music": music}
    UnifiedModel(llama, vocabulary, CHAT, text, tokenizers).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def unified(folder: Path) -> UnifiedModel:
    return UnifiedModel.from_pretrained(folder)


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy"))


def test_folder_is_plain_and_comes_back(folder: Path, unified: UnifiedModel, tmp_path: Path) -> None:
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {"config.json", "model.safetensors", "vocabulary.json", "template.json", "text.model"} <= names
    assert {"tokenizers/image/model.safetensors", "tokenizers/speech/config.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".py"))]
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    unified.save_pretrained(tmp_path / "again")
    again = UnifiedModel.from_pretrained(tmp_path / "again")
    assert again.vocabulary.fingerprint == unified.vocabulary.fingerprint
    for name, tensor in unified.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    assert {str(p.relative_to(tmp_path / "again")) for p in (tmp_path / "again").rglob("*") if p.is_file()} == names


def test_saving_over_a_model_replaces_it(folder: Path, unified: UnifiedModel, tmp_path: Path) -> None:
    target = copied(folder, tmp_path)
    (target / "text.model").write_bytes(b"broken")
    unified.save_pretrained(target)
    UnifiedModel.from_pretrained(target)


def test_every_direction_decodes(unified: UnifiedModel) -> None:
    names = ("text", *unified.vocabulary.modalities)
    rng = np.random.default_rng(0)
    samples, requests = [], []
    for source in names:
        for target in names:
            content = (
                SAYINGS[0] if source == "text" else rng.integers(0, 16, (2, 2, 2) if source == "image" else (2, 7))
            )
            samples.append(Sample([Segment(source, content, "user")]))
            requests.append(Request(order=(target,), max_ids=60))
    settings = {name: Sampling(temperature=2.0) for name in names}
    answers = unified.respond(samples, requests, settings, seed=1, batch_size=7)
    for answer, request in zip(answers, requests, strict=True):
        (output,) = answer
        assert (output.modality,) == request.order
        if output.modality == "text":
            assert output.text is not None and output.codes is None and output.media is None
            continue
        assert output.text is None and output.codes is not None and output.media is not None
        assert output.codes.dtype == torch.int64 and output.media.dtype == torch.float32
        frames = output.codes.shape[1]
        assert output.media.shape == ((3, 16, 16) if output.modality == "image" else (1, frames * 160))
    again = unified.respond(samples, requests, settings, seed=1, decode=False)
    for a, b in zip(answers, again, strict=True):
        assert a[0].text == b[0].text and b[0].media is None
        assert (a[0].codes is None and b[0].codes is None) or torch.equal(a[0].codes, b[0].codes)  # type: ignore[arg-type]


def test_hundreds_of_hot_answers_decode(unified: UnifiedModel) -> None:
    rng = np.random.default_rng(4)
    requests = [
        Request(required={str(rng.choice(unified.vocabulary.modalities))}, max_ids=int(rng.integers(25, 70)))
        for _ in range(300)
    ]
    samples = [Sample([Segment("text", SAYINGS[i % 3], "user")]) for i in range(300)]
    settings = {name: Sampling(temperature=2.0) for name in ("text", *unified.vocabulary.modalities)}
    for answer, request in zip(unified.respond(samples, requests, settings, seed=3), requests, strict=True):
        assert set(request.required) <= {output.modality for output in answer}
        for output in answer:
            assert (output.text is None) == (output.modality != "text")
            assert output.media is None or bool(torch.isfinite(output.media).all())


def test_media_in_batches_equal_media_alone(unified: UnifiedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    audio = [torch.randn(1, n, generator=generator) * 0.1 for n in (700, 160, 1201, 700)]
    codes = unified.encode_media("speech", audio)
    assert [tuple(c.shape) for c in codes] == [(2, 5), (2, 1), (2, 8), (2, 5)]
    for item, expected in zip(audio, codes, strict=True):
        assert torch.equal(unified.encode_media("speech", [item[0]])[0], expected)
    decoded = unified.decode_media("speech", codes)
    assert [m.shape[-1] for m in decoded] == [800, 160, 1280, 800]
    for item, expected in zip(codes, decoded, strict=True):
        torch.testing.assert_close(unified.decode_media("speech", [item.numpy()])[0], expected, atol=1e-5, rtol=0)
    images = torch.rand(3, 3, 16, 16, generator=generator)
    grids = unified.encode_media("image", images)
    assert torch.equal(grids[1], unified.encode_media("image", [images[1]])[0])
    assert torch.stack(unified.decode_media("image", grids)).shape == images.shape


def test_generate_takes_text_tensors_codes_and_files(unified: UnifiedModel, tmp_path: Path) -> None:
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    write_image(tmp_path / "wide.png", torch.nn.functional.pad(image, (16, 16)))
    write_audio(tmp_path / "hiss.wav", torch.randn(1, 1000) * 0.1, 16000)
    picture = unified.generate("image", text="a red circle", seed=1)
    assert picture.media is not None and picture.media.shape == (3, 16, 16)
    heard = unified.generate("text", speech=tmp_path / "hiss.wav", image=str(tmp_path / "wide.png"), sampling=GREEDY)
    assert heard.text is not None
    assert picture.codes is not None
    both = unified.generate(("text", "music"), image=picture.codes, sampling=Sampling(0.5))
    assert [output.modality for output in both] == ["text", "music"]
    same = unified.generate("speech", image=image, seed=3)
    assert torch.equal(same.codes, unified.generate("speech", image=image, seed=3).codes)  # type: ignore[arg-type]
    guided = unified.generate("image", text="a red circle", seed=1, guidance={"image": 3.0})
    assert guided.media is not None


def test_bfloat16(folder: Path) -> None:
    model = UnifiedModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.model.dtype == torch.bfloat16
    output = model.generate("music", text="sing")
    assert output.media is not None and output.media.dtype == torch.float32


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    target = copied(folder, tmp_path)
    other = AudioCodec(**{**codec("music", 2).config, "seed": 5})
    other.save_pretrained(target / "tokenizers" / "music")
    with pytest.raises(
        FingerprintError, match="tokenizers/music has fingerprint .* put the tokenizer of the training back"
    ):
        UnifiedModel.from_pretrained(target)


def test_another_text_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    target = copied(folder, tmp_path)
    TextTokenizer.train([*SAYINGS, "something else"], vocab_size=300).save(target / "text.model")
    with pytest.raises(FingerprintError, match="text.model has fingerprint"):
        UnifiedModel.from_pretrained(target)


def test_edited_manifest_is_refused(folder: Path, tmp_path: Path) -> None:
    target = copied(folder, tmp_path)
    manifest = json.loads((target / "vocabulary.json").read_text())
    manifest["blocks"][0]["first_id"] += 1
    (target / "vocabulary.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="vocabulary.json"):
        UnifiedModel.from_pretrained(target)


def test_broken_folders_are_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no vocabulary.json"):
        UnifiedModel.from_pretrained(tmp_path)
    target = copied(folder, tmp_path)
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="does not load"):
        UnifiedModel.from_pretrained(target)
    (target / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="does not load"):
        UnifiedModel.from_pretrained(target)
    shutil.rmtree(target / "tokenizers" / "image")
    with pytest.raises(CheckpointError, match="image: no such folder"):
        UnifiedModel.from_pretrained(target)


def test_missing_weights_are_never_made_up(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    target = copied(folder, tmp_path)
    weights = load_file(target / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj"):
        UnifiedModel.from_pretrained(target)


def test_model_of_another_size_is_refused(unified: UnifiedModel) -> None:
    small = new_llama(Vocabulary.build(20), hidden_size=32, num_layers=1, num_heads=2)
    with pytest.raises(CheckpointError, match="has 128 rows"):
        UnifiedModel(small, unified.vocabulary, CHAT, unified.text, unified.tokenizers)


def test_inputs_that_do_not_fit(unified: UnifiedModel) -> None:
    with pytest.raises(ManifestError, match="no modality 'video'"):
        unified.generate("text", video=torch.zeros(1, 2))
    with pytest.raises(CodesError, match="grid"):
        unified.generate("text", image=torch.rand(3, 32, 32))


def test_a_window_of_attention_bounds_an_answer(folder: Path) -> None:
    model = UnifiedModel.from_pretrained(folder)
    whole = model.max_length
    model.model.config.sliding_window = whole // 2
    assert model.max_length == whole // 2 == Engine(model.model, model.vocabulary, streams=1).capacity
