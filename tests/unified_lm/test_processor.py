"""`AnyglotProcessor`: conversations to the ids of the template, answers to text and media."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from anyglot_lm.grammar import GrammarError
from anyglot_lm.model import new_llama
from anyglot_lm.processor import AnyglotProcessor, ConversationError
from anyglot_lm.segments import CHAT, Sample, Segment
from anyglot_lm.text import TextTokenizer
from anyglot_lm.unified import UnifiedModel
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_tokenizers.audio import AudioCodec
from anyglot_tokenizers.errors import CheckpointError, CodesError, ManifestError, MediaError
from anyglot_tokenizers.image import ImageVQ
from anyglot_tokenizers.media import write_audio, write_image

SAYINGS = ["a large red circle at the top left", "make the square blue", "two things: a star and a ring"]


def codec(modality: str) -> AudioCodec:
    shape = {"n_fft": 320, "hop": 80, "stride": 2, "num_mels": 16, "dim": 16, "encoder_depth": 1, "decoder_depth": 1}
    return AudioCodec(modality=modality, **shape, num_quantizers=2, codebook_size=16, codebook_dim=8).eval()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    text = TextTokenizer.train(SAYINGS, vocab_size=300)
    image = ImageVQ(channels=(8,), patch=8, downsample_factor=8, codebook_size=16, codebook_dim=8).eval()
    tokenizers = {"image": image, "speech": codec("speech"), "music": codec("music")}
    vocabulary = Vocabulary.build(
        text.size,
        BlockSpec.from_code_spec(image.spec, pattern="raster", grid=(2, 2)),
        BlockSpec.from_code_spec(tokenizers["speech"].spec, pattern="delay", input_pattern="first", max_frames=9),
        BlockSpec.from_code_spec(tokenizers["music"].spec, max_frames=12),
        text_fingerprint=text.fingerprint,
    )
    llama = new_llama(vocabulary, hidden_size=32, num_layers=1, num_heads=2, max_length=160)
    UnifiedModel(llama, vocabulary, CHAT, text, tokenizers).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def processor(folder: Path) -> AnyglotProcessor:
    return AnyglotProcessor.from_pretrained(folder)


def prompt_of(processor: AnyglotProcessor, *segments: Segment) -> list[int]:
    return processor.template.prompt(Sample(segments), processor.vocabulary, processor.text).tolist()


def ids_of(inputs: Any, row: int = 0) -> list[int]:
    """A row without its padding."""
    mask = inputs["attention_mask"][row].bool()
    assert mask.tolist() == sorted(mask.tolist()), "padding is on the left"
    ids: list[int] = inputs["input_ids"][row][mask].tolist()
    return ids


@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.lists(st.text(max_size=20), max_size=3)), max_size=4)
)
@example([("user", ["<|anyglot:eos|><image><s>", "</s>"]), ("assistant", ["<0x41>", ""])])
def test_conversations_are_those_of_the_template(
    processor: AnyglotProcessor, messages: list[tuple[Any, list[str]]]
) -> None:
    segments = [Segment("text", text, role) for role, texts in messages for text in texts]
    given_ = [{"role": role, "content": [{"type": "text", "text": t} for t in texts]} for role, texts in messages]
    prompt = ids_of(processor.apply_chat_template(given_, add_generation_prompt=True))
    assert prompt == prompt_of(processor, *segments)
    controls = processor.vocabulary.controls
    assert prompt.count(controls["assistant"]) <= 1 + sum(role == "assistant" for role, _ in messages)
    assert max(prompt) < processor.vocabulary.open_size - 3, "no text makes a start or a code"
    if segments:
        whole, _ = processor.template.render(Sample(segments), processor.vocabulary, processor.text)
        assert ids_of(processor.apply_chat_template(given_, add_generation_prompt=False)) == whole.tolist()
        assert ids_of(processor.apply_chat_template(given_, continue_final_message=True)) == whole[:-1].tolist()


def test_media_of_every_form_are_the_same_ids(processor: AnyglotProcessor, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    image = (torch.rand(3, 16, 16, generator=generator) * 255).round() / 255
    sound = torch.randn(1, 1000, generator=generator) * 0.1
    write_image(tmp_path / "a.png", image)
    write_audio(tmp_path / "a.wav", sound, 16000)
    sound = processor.read_media("speech", tmp_path / "a.wav")
    codes = processor.encode_media("image", [image])[0]
    heard = processor.encode_media("speech", [sound])[0]
    pil = Image.open(tmp_path / "a.png")
    wanted = prompt_of(
        processor,
        Segment("image", codes.numpy(), "user"),
        Segment("speech", heard.numpy(), "user"),
        Segment("text", "what is it?", "user"),
    )
    images = [
        {"image": image},
        {"image": codes},
        {"image": pil},
        {"path": str(tmp_path / "a.png")},
        {"url": str(tmp_path / "a.png")},
        {"image": (tmp_path / "a.png").read_bytes()},
    ]
    sounds = [
        {"speech": sound},
        {"speech": sound[0].numpy()},
        {"speech": sound[0].numpy(), "sampling_rate": 16000},
        {"speech": heard.numpy()},
        {"path": tmp_path / "a.wav", "sampling_rate": 8000},  # a file says its own
        {"speech": (tmp_path / "a.wav").read_bytes()},
    ]
    batch = []
    for picture, voice in zip(images, sounds, strict=True):
        parts = [{"type": "image", **picture}, {"type": "speech", **voice}, {"type": "text", "text": "what is it?"}]
        batch.append([{"role": "user", "content": parts}])
    found = processor.apply_chat_template(batch)
    assert [ids_of(found, row) for row in range(len(batch))] == [wanted] * len(batch)
    assert found["input_ids"].dtype == torch.int64 and found["attention_mask"].dtype == torch.int64
    assert torch.equal(processor.apply_chat_template(batch, return_dict=False), found["input_ids"])


def test_pil_images_are_read_as_files_are(processor: AnyglotProcessor, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 40, 4), dtype=np.uint8)
    turned = Image.fromarray(pixels[..., :3])
    exif = turned.getexif()
    exif[0x0112] = 6
    deep = Image.fromarray(rng.integers(0, 2**16, (24, 40), dtype=np.uint16))
    for name, image, options in [
        ("alpha.png", Image.fromarray(pixels), {}),
        ("palette.png", Image.fromarray(pixels).quantize(8), {}),
        ("turned.png", turned, {"exif": exif}),
        ("deep.png", deep, {}),
        ("print.tiff", Image.fromarray(pixels[..., :3]).convert("CMYK"), {}),
    ]:
        image.save(tmp_path / name, **options)
        with Image.open(tmp_path / name) as opened:
            parts = [{"type": "image", "image": opened}, {"type": "image", "path": str(tmp_path / name)}]
            ids = ids_of(processor.apply_chat_template([{"role": "user", "content": parts}]))
        start = processor.vocabulary.block("image").start_id
        first, second = (i for i, token in enumerate(ids) if token == start)
        assert ids[first:second] == ids[second : second + second - first], name


def test_sounds_at_another_rate_are_resampled(processor: AnyglotProcessor) -> None:
    sound = torch.from_numpy(np.sin(np.arange(4410) / 9).astype(np.float32))[None] * 0.5
    file = io.BytesIO()
    soundfile.write(file, sound[0].numpy(), 44100, format="WAV", subtype="FLOAT")
    parts = [{"type": "music", "music": sound, "sampling_rate": 44100}, {"type": "music", "music": file.getvalue()}]
    found = [ids_of(processor.apply_chat_template([{"role": "user", "content": [part]}])) for part in parts]
    assert found[0] == found[1] and len(found[0]) == 3 + 2 + 10 * 2


def test_call_is_one_turn(processor: AnyglotProcessor) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    codes = processor.encode_media("image", images)
    seen = [Segment("image", item.numpy(), "user") for item in codes]
    said = [Segment("text", text, "user") for text in ("one", "two words")]
    assert ids_of(processor("one", images[0])) == prompt_of(processor, seen[0], said[0])
    assert ids_of(processor("one", [images[0], images[1]])) == prompt_of(processor, *seen, said[0])
    assert ids_of(processor(images=images[0])) == prompt_of(processor, seen[0])
    batch = processor(["one", "two words"], [None, [images[0], images[1]]])
    assert ids_of(batch, 0) == prompt_of(processor, said[0])
    assert ids_of(batch, 1) == prompt_of(processor, *seen, said[1])
    with pytest.raises(ConversationError, match="3 of image for 2 texts"):
        processor(["one", "two words"], [None] * 3)
    with pytest.raises(ConversationError, match="audio may be speech or music here; name it"):
        processor("one", audio=torch.zeros(160))


def test_answers_become_text_and_media(processor: AnyglotProcessor) -> None:
    vocabulary, rng = processor.vocabulary, np.random.default_rng(3)
    picture, voice = rng.integers(0, 16, (2, 2, 2)), rng.integers(0, 16, (2, 5))
    eos, pad = vocabulary.controls["eos"], vocabulary.pad_id
    prompt = ids_of(processor.apply_chat_template([{"role": "user", "content": "draw"}]))
    answer = [*processor.text.encode("here: "), *vocabulary.span("image", picture), *processor.text.encode("and ")]
    answer += [*vocabulary.span("speech", voice), eos]
    rows = [[pad, *prompt, *answer, pad, pad], answer, [*prompt, *answer[:-1]], [*prompt, *prompt, *answer, 3]]
    width = max(map(len, rows))
    tensor = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    for generated in (rows, tensor):
        for outputs in processor.parse(generated):
            assert [output.modality for output in outputs] == ["text", "image", "text", "speech"]
            assert outputs[0].text == "here: " and outputs[1].codes is not None and outputs[1].media is not None
            np.testing.assert_array_equal(outputs[1].codes, picture)
            assert outputs[1].media.shape == (3, 16, 16) and outputs[3].media is not None
    assert processor.parse(answer, decode=False)[0][1].media is None
    assert processor.post_process_multimodal_output(tensor) == ["here: and "] * 4
    image = processor.post_process_multimodal_output(tensor, generation_mode="image")[2]
    decoded = processor.decode_media("image", [picture])[0]
    assert isinstance(image, Image.Image) and image.size == (16, 16)
    np.testing.assert_allclose(np.asarray(image).transpose(2, 0, 1) / 255, decoded.clamp(0, 1), atol=0.002)
    for mode in ("audio", "speech"):
        sound = processor.post_process_multimodal_output(tensor[0], generation_mode=mode)[0]
        np.testing.assert_array_equal(sound, processor.decode_media("speech", [voice])[0])
        assert sound.dtype == np.float32 and sound.shape == (1, 800)
    with pytest.raises(CodesError, match="answer 0 holds no music, but text, image, text, speech"):
        processor.post_process_multimodal_output(tensor, generation_mode="music")
    with pytest.raises(ConversationError, match="'video'; this model has text, image, speech, music, audio"):
        processor.post_process_multimodal_output(tensor, generation_mode="video")
    with pytest.raises(CodesError, match="has no end"):
        processor.parse([*prompt, *vocabulary.span("image", picture)[:4]])
    with pytest.raises(GrammarError, match="control 'user'"):
        processor.parse([1, vocabulary.controls["user"], 2])


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, ConversationError, "content of a message is None"),
        ([{"type": "video", "path": "a.mp4"}], ConversationError, "'video'; this model has text, image, speech"),
        ([{"type": "image"}], ConversationError, "holds nothing under 'image' or 'path'"),
        ([{"text": "a"}], ConversationError, "a part of type None"),
        ([{"type": "text", "text": 3}], ConversationError, "a text is 3"),
        ([{"type": "text", "path": "a.txt"}], ConversationError, "a text is None"),
        (["a", "b"], ConversationError, "give a text or a list of parts"),
        ([{"type": "image", "url": "https://example.org/a.png"}], ConversationError, "is not fetched; download it"),
        ([{"type": "image", "path": "nowhere.png"}], MediaError, "nowhere.png: no such file"),
        ([{"type": "image", "image": b"x"}], MediaError, "image of 1 bytes: not a picture"),
        ([{"type": "image", "image": np.zeros((2, 3, 3), int)}], CodesError, r"grid \(3, 3\)"),
        ([{"type": "speech", "speech": np.zeros(9, np.int16), "sampling_rate": 8000}], ConversationError, "are int16"),
        (
            [{"type": "speech", "speech": np.zeros(9), "sampling_rate": "8k"}],
            ConversationError,
            "sampling_rate is '8k'",
        ),
        ([{"type": "speech", "speech": np.zeros(9), "sampling_rate": 0}], ConversationError, "sampling_rate is 0"),
    ],
)
def test_wrong_parts(processor: AnyglotProcessor, content: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        processor.apply_chat_template([{"role": "user", "content": content}])


def test_wrong_use(processor: AnyglotProcessor, tmp_path: Path) -> None:
    message = {"role": "user", "content": "a"}
    with pytest.raises(ManifestError, match="role 'system'"):
        processor.apply_chat_template([{"role": "system", "content": "a"}])
    with pytest.raises(ConversationError, match="a message is 'a'; give an object"):
        processor.apply_chat_template(["a"])
    with pytest.raises(ConversationError, match="for 0 texts; give one text at least"):
        processor([])
    with pytest.raises(ConversationError, match="tensors of ids"):
        processor.apply_chat_template([message], tokenize=False)
    with pytest.raises(ConversationError, match="either add_generation_prompt"):
        processor.apply_chat_template([message], add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(ConversationError, match="spans hold no special tokens"):
        processor.post_process_multimodal_output([[1]], skip_special_tokens=False)
    with pytest.raises(CheckpointError, match="holds no vocabulary.json"):
        AnyglotProcessor.from_pretrained(tmp_path)
