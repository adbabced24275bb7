"""`anyglot eval data` end to end: real outputs of the shipped model, judged by tiny checkpoints from their folders."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyglot_lm.unified import Output, UnifiedModel
from anyglot_recipes.cli import main
from anyglot_recipes.data_eval.evidence import Evidence, Judges
from anyglot_recipes.data_eval.items import Item, Task, choose, codes_of, others, read_task
from anyglot_recipes.data_eval.report import markdown
from anyglot_recipes.data_eval.run import Settings, evaluate_data
from anyglot_recipes.data_eval.scores import clip, exact, retrieval
from anyglot_recipes.importers.rows import Row, RowError
from anyglot_recipes.metrics.clap import Clap
from anyglot_recipes.metrics.clip import Clip
from anyglot_recipes.shipped import NANO
from anyglot_synth.nanoworld import melody, voices
from anyglot_synth.nanoworld.draw import draw
from anyglot_synth.nanoworld.language import describe
from anyglot_synth.nanoworld.scene import Scene, Thing
from anyglot_tokenizers.errors import AnyglotError, ManifestError
from anyglot_tokenizers.media import write_audio, write_image

CHARACTERS = [chr(code) for code in range(33, 127)]
SCENES = [
    Scene((Thing(shape, color, "large", "top", "left"),))
    for shape, color in (("circle", "red"), ("square", "blue"), ("triangle", "green"), ("circle", "yellow"))
]


@pytest.fixture(scope="module")
def nano() -> UnifiedModel:
    return UnifiedModel.from_pretrained(NANO)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four scenes drawn, described twice, said and played; a row without a caption and one whose picture is broken."""
    folder = tmp_path_factory.mktemp("source")
    rows = []
    for i, scene in enumerate(SCENES):
        write_image(folder / f"{i}.png", torch.from_numpy(draw(scene)).permute(2, 0, 1).float() / 255)
        write_audio(folder / f"{i}-music.wav", torch.from_numpy(melody.render(scene))[None].float(), 16_000)
        spoken = folder / f"{i}.wav"
        if voices.installed_voices():
            said = voices.speak(describe(scene, None, "spoken"), voices.VOICES[0].name)
            write_audio(spoken, torch.from_numpy(said)[None].float(), voices.SAMPLE_RATE)
        else:
            write_audio(spoken, torch.from_numpy(melody.render(scene))[None].float(), 16_000)
        for text in (describe(scene), f"there is {describe(scene)}"):
            rows.append([f"{i}.png", text, spoken.name, f"{i}-music.wav"])
    rows += [["0.png", "", "", ""], ["broken.png", "a broken picture", "", ""]]
    (folder / "broken.png").write_bytes(b"no picture")
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption", "speech", "music"], *rows])
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights, in the publisher's layout."""
    import transformers

    folder = tmp_path_factory.mktemp("clip")
    tokens = [*CHARACTERS, *(f"{c}</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    end = vocabulary["<|endoftext|>"]
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    width = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = width | {"vocab_size": len(tokens), "max_position_embeddings": 40, "eos_token_id": end, "pad_token_id": end}
    config = transformers.CLIPConfig(
        text_config=text | {"bos_token_id": end - 1},
        vision_config=width | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(1)
    transformers.CLIPModel(config).save_pretrained(folder)
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def clap_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLAP of random weights that hears one second."""
    import transformers

    folder = tmp_path_factory.mktemp("clap")
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *CHARACTERS]
    tokenizer = transformers.RobertaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.save_pretrained(folder)
    width = {"hidden_size": 16, "num_hidden_layers": 1, "projection_dim": 8}
    text = width | {"intermediate_size": 16, "num_attention_heads": 2, "max_position_embeddings": 34}
    sizes = {"spec_size": 64, "num_mel_bins": 16, "window_size": 2, "depths": (1, 1), "num_attention_heads": (2, 2)}
    config = transformers.ClapConfig(
        text_config=text | {"vocab_size": len(tokenizer)},
        audio_config=width | sizes | {"patch_embeds_hidden_size": 8, "num_hidden_layers": 2},
        projection_dim=8,
    )
    torch.manual_seed(1)
    transformers.ClapModel(config).save_pretrained(folder)
    sound = {"feature_size": 16, "hop_length": 160, "fft_window_size": 400, "frequency_max": 8000, "max_length_s": 1}
    transformers.ClapFeatureExtractor(sampling_rate=24_000, truncation="rand_trunc", **sound).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wavlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WavLM with an x-vector head, of random weights."""
    import transformers

    folder = tmp_path_factory.mktemp("wavlm")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    tails = {"tdnn_dim": (8, 8), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 6}
    small = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_buckets": 8}
    config = transformers.WavLMConfig(**sizes, **convolutions, **tails, **small)
    transformers.WavLMForXVector(config).save_pretrained(folder)
    return folder


# Judges


def test_clip_embeds_as_transformers_does(clip_folder: Path) -> None:
    import transformers

    judge = Clip(str(clip_folder))
    image = torch.rand(3, 32, 32).mul(255).round() / 255
    long = "many words " * 30
    with torch.inference_mode():
        processor = judge.processor
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
        direct = transformers.CLIPModel.from_pretrained(clip_folder)(
            input_ids=judge.tokenizer(["A photo depicts a cat"], return_tensors="pt")["input_ids"],
            pixel_values=((image - mean) / deviation)[None],
        )
    assert torch.allclose(judge.media([image])[0], direct.image_embeds[0], atol=1e-5)
    alone = judge.texts(["a cat"])[0]
    assert torch.allclose(alone, direct.text_embeds[0], atol=1e-5)
    assert torch.allclose(judge.texts([long, "a cat"])[1], alone, atol=1e-5), "padding changes nothing"
    assert judge.media([torch.rand(3, 50, 90), torch.rand(3, 20, 20)]).norm(dim=1).tolist() == pytest.approx([1, 1])


def test_clap_hears_long_sounds_whole_and_always_alike(clap_folder: Path) -> None:
    judge = Clap(str(clap_folder))
    assert judge.sample_rate == 24_000
    one, other = torch.rand(2, 24_000)
    first, second = judge.media([one[None], other[None]])
    both = judge.media([torch.cat([one, other])[None]])[0]
    assert torch.allclose(both, torch.nn.functional.normalize(first + second, dim=0), atol=1e-5)
    assert torch.equal(judge.media([one[None, :9000]]), judge.media([one[None, :9000]]))
    texts = judge.texts(["a tune", "many words " * 30])
    assert texts.norm(dim=1).tolist() == pytest.approx([1, 1])
    assert torch.allclose(judge.texts(["a tune"])[0], texts[0], atol=1e-5)


def test_checkpoints_of_another_kind_or_in_part_are_refused(
    clip_folder: Path, clap_folder: Path, tmp_path: Path
) -> None:
    import transformers

    with pytest.raises(AnyglotError, match=r"is a clap model, where a clip model is wanted; name one with --clip"):
        Clip(str(clap_folder))
    with pytest.raises(AnyglotError, match="cannot be loaded as a clap model"):
        Clap(str(tmp_path))
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    weights = {key: value for key, value in model.state_dict().items() if key != "visual_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(AnyglotError, match=r"lacks 1 weights, such as visual_projection.weight"):
        Clip(str(tmp_path))


# Items


def rows_of(*contents: tuple[str, str]) -> list[Row | RowError]:
    return [Row("m.csv", i, text, {"image": Path(image)}) for i, (image, text) in enumerate(contents, 1)]


CAPTION = Task(("image",), "text")


def test_rows_of_one_picture_are_one_item() -> None:
    rows = rows_of(("a.png", "one"), ("b.png", "two"), ("a.png", "three"), ("a.png", "one"))
    items = choose([*rows, RowError("m.csv", 9, "m.csv", "is odd")], CAPTION, None, 0, left_out := Counter())
    assert [(item.name, item.texts()) for item in items] == [("m.csv:1", ["one", "three"]), ("m.csv:2", ["two"])]
    assert left_out == {"bad row: is odd": 1}
    back = choose(rows, Task(("text",), "image"), None, 0, Counter())
    assert [len(item.contents["image"]) for item in back] == [1, 1, 1]


def test_the_choice_is_even_repeatable_and_whole() -> None:
    rows = rows_of(*((f"{i}.png", f"{i} {k}") for k in range(2) for i in range(30)))
    chosen: Counter[str] = Counter()
    for seed in range(200):
        items = choose(rows, CAPTION, 10, seed, Counter())
        assert len(items) == 10 and all(len(item.texts()) == 2 for item in items), "no reference is lost"
        chosen.update(item.name for item in items)
    assert len(chosen) == 30 and min(chosen.values()) > 40 and max(chosen.values()) < 95
    assert choose(rows, CAPTION, 10, 3, Counter()) == choose(rows, CAPTION, 10, 3, Counter())


def test_others_are_never_the_item_itself() -> None:
    found = others(9, np.random.default_rng(0), 5)
    assert all(len(set(chosen)) == 5 and i not in chosen for i, chosen in enumerate(found))
    assert len(others(3, np.random.default_rng(0), 5)[0]) == 2 and others(1, np.random.default_rng(0), 5) == [[]]


def test_a_medium_that_the_tokenizer_refuses_does_not_end_the_run(tiny_model: UnifiedModel) -> None:
    good, bad = torch.rand(3, 64, 64), torch.full((3, 64, 64), torch.nan)
    first, second, third = codes_of(tiny_model, "image", [good, bad, good])
    assert isinstance(first, np.ndarray) and isinstance(second, AnyglotError)
    assert np.array_equal(first, third) and first.shape == (1, 4, 4)  # type: ignore[arg-type]


# Scores


class Flags:
    """A space of two dimensions: media by their first pixel, texts by their first word."""

    name, sample_rate = "flags", None

    def texts(self, texts: Any) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0] if text.startswith("white") else [0.0, 1.0] for text in texts])

    def media(self, media: Any) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0] if image[0, 0, 0] > 0.5 else [0.0, 1.0] for image in media])


def test_missing_outputs_count_as_wrong(tiny_model: UnifiedModel, tmp_path: Path) -> None:
    items = []
    for i, bright in enumerate((1.0, 0.0, 1.0, 0.0)):
        write_image(tmp_path / f"{i}.png", torch.full((3, 64, 64), bright))
        codes = {"image": np.zeros((1, 4, 4), np.int64)}
        text = f"{'white' if bright else 'black'} {i}"
        items.append(Item(str(i), {"image": [tmp_path / f"{i}.png"], "text": [text]}, codes, keys=frozenset({text})))
    outputs = [Output("text", text=text) for text in ("white", "black", "black")]
    rng = np.random.default_rng(0)
    evidence = Evidence(tiny_model, CAPTION, items, [*outputs, None], Judges(clip=Flags()), rng)
    row = clip(evidence)[0].row()
    assert (row["n"], row["missing"], row["value"], row["ceiling"]) == (4, 1, 1.25, 2.5)
    assert row["low"] < 1.25 < row["high"] and 0 < row["chance"] < 2.5  # type: ignore[operator]
    found = retrieval(evidence)[0]
    assert [score[0] for score in found.scores if score] == [0.5, 0.5, 0.0, 0.0], "two pictures look the same"
    assert found.row()["chance"] == 0.25


def written(model: UnifiedModel, texts: list[str], outputs: list[str | None]) -> dict[str, Any]:
    items = [Item(str(i), {"text": [text]}, keys=frozenset({text})) for i, text in enumerate(texts)]
    answers = [None if text is None else Output("text", text=text) for text in outputs]
    return exact(Evidence(model, CAPTION, items, answers, Judges(), np.random.default_rng(0)))[0].row()


def test_chance_is_that_of_answers_to_other_items(tiny_model: UnifiedModel) -> None:
    """Two labels: an answer to any other item is right half of the time, however good the model is."""
    labels = ["red", "blue"] * 100
    row = written(tiny_model, labels, [*labels])
    assert row["value"] == 1.0 and abs(row["chance"] - 0.5) < 0.1


def test_a_reference_without_words_is_met_by_its_characters_alone(tiny_model: UnifiedModel) -> None:
    signs = ["\U0001f600", "...", "cat", "\U0001f600", "Cat!"]
    row = written(tiny_model, signs, [None, "!!!", "cat", " \U0001f600 ", "cat"])
    assert (row["n"], row["missing"]) == (5, 1) and row["value"] == 0.6


# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["eval", "data", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["eval", "data", *map(str, arguments)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("anyglot: ")]
    return line


def values(report: dict[str, Any]) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in report["rows"]}


def test_captions(source: Path, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(capsys, source, "--task", "image->text", "--clip", clip_folder, "--out", tmp_path / "out")
    rows = {row["metric"]: row for row in report["rows"]}
    assert list(rows) == ["exact", "cider", "clip", "retrieval", "ranking", "ranking_given"]
    assert all(row["n"] == 4 and row["missing"] == 0 for row in rows.values())
    assert rows["cider"]["value"] > 2 > rows["cider"]["chance"], "the shipped model sees what is there"
    assert rows["cider"]["low"] <= rows["cider"]["value"] <= rows["cider"]["high"]
    assert 0 < rows["cider"]["ceiling"] <= 10
    assert rows["ranking"]["value"] >= 0.75 and rows["ranking"]["chance"] == pytest.approx(0.25)
    assert rows["ranking_given"]["value"] >= 0.75 and rows["retrieval"]["chance"] == 0.25
    assert report["left_out"]["rows"] == 1 and "broken.png" in next(iter(report["left_out"]["reasons"]))
    assert all(len(item["references"]) == 2 and item["output"] for item in report["items"])
    for name in ("ranking", "ranking_given"):
        assert all((item["scores"][name] == 1) == (item[f"{name}_rank"] == 1) for item in report["items"])
        ranks = [item[f"{name}_rank"] for item in report["items"]]
        assert all(1 <= rank <= 4 for rank in ranks) and f"mean rank {np.mean(ranks):.2f}" in rows[name]["note"]
    for name, row in rows.items():
        assert row["value"] == pytest.approx(np.mean([item["scores"][name] for item in report["items"]]), abs=1e-3)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["rows"] == report["rows"]
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| cider | 4 |" in page and "broken.png" in page.replace("\\", "")
    assert all((tmp_path / "out" / item["files"]["image"]).is_file() for item in written["items"])
    again = run(capsys, source, "--task", "image->text", "--clip", clip_folder)
    assert again["rows"] == report["rows"]


def test_pictures(source: Path, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--task", "text->image", "--num", 3, "--seed", 1, "--clip", clip_folder, "--out", tmp_path)
    report = run(capsys, source, *options, "--metrics", "clip,clip_image,retrieval")
    rows = {row["metric"]: row for row in report["rows"]}
    assert list(rows) == ["clip", "clip_image", "retrieval"] and all(row["n"] for row in rows.values())
    assert 0 <= rows["clip"]["value"] <= 2.5 and rows["clip"]["ceiling"] is not None
    assert rows["clip_image"]["value"] > 0.5
    assert sorted(path.name for path in (tmp_path / "media").iterdir()) == [
        f"{i:05d}-output-image.png" for i in range(3)
    ]
    assert "not kept, name a folder" not in markdown(report), "it shows the files"
    del report["items"][0]["files"]["output"]
    assert "not kept, name a folder" in markdown(report).replace("\\", "")
    assert report["settings"]["num"] == 3 and report["judges"] == {"clip": str(clip_folder)}


@pytest.mark.slow
def test_speech_in_and_out(
    source: Path, wavlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not voices.installed_voices():
        pytest.skip("no speech engine (flite, espeak-ng) is here")
    heard = run(capsys, source, "--task", "speech->text", "--metrics", "wer,cer")
    assert values(heard)["wer"] < 0.9 and values(heard)["cer"] < 0.9
    options = ("--recogniser", "nanoworld", "--xvector", wavlm_folder, "--num", 4)
    said = run(capsys, source, "--task", "text->speech", *options, "--metrics", "wer,speaker", "--out", tmp_path)
    rows = {row["metric"]: row for row in said["rows"]}
    assert rows["wer"]["value"] < rows["wer"]["chance"], "it says what it was given"
    assert rows["wer"]["ceiling"] < rows["wer"]["value"] + 0.2
    assert -1 <= rows["speaker"]["value"] <= 1 and rows["speaker"]["ceiling"] is not None
    assert said["judges"]["recogniser"]["engine"] == "nanoworld" and said["judges"]["speaker"] == str(wavlm_folder)
    assert all("heard" in item for item in said["items"])
    assert len(list((tmp_path / "media").glob("*-output-speech.wav"))) == 4


@pytest.mark.slow
def test_music(source: Path, clap_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--clap", clap_folder, "--num", 3, "--metrics", "clap,retrieval")
    made = run(capsys, source, "--task", "text->music", *options)
    assert [row["metric"] for row in made["rows"]] == ["clap", "retrieval"]
    described = run(capsys, source, "--task", "music->text", *options)
    assert all(-1 <= values(report)["clap"] <= 1 for report in (made, described))


def test_ranking_alone_writes_nothing(nano: UnifiedModel, source: Path) -> None:
    lines: list[str] = []
    report, _ = evaluate_data(nano, source, "image->text", metrics=["ranking"], progress=lines.append)
    assert lines == ["ranking: done"] and all(item["output"] is None for item in report["items"])
    assert {row["metric"] for row in report["rows"]} == {"ranking", "ranking_given"}
    assert "not asked for" in markdown(report)


def test_a_prompt_that_leaves_no_room_is_a_missing_answer(tiny_model: UnifiedModel, tmp_path: Path) -> None:
    lines = [{"text": "red"}, {"text": "blue " * 600}]
    write_image(tmp_path / "a.png", torch.rand(3, 64, 64))
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(line | {"image": "a.png"}) for line in lines))
    judges = Judges(clip=Flags())
    report, _ = evaluate_data(tiny_model, tmp_path, "text->image", metrics=["clip"], judges=judges)
    assert (report["rows"][0]["n"], report["rows"][0]["missing"]) == (2, 1)
    assert "leaves 0 of 1024 positions" in report["items"][1]["why"] and report["items"][1]["scores"] == {"clip": 0.0}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", "image->depth"], "has no 'depth', only text, image, speech, music"),
        (["--task", "image"], "such as image->text"),
        (["--task", "image->text,speech"], "one at a time"),
        (["--task", "image+text->text"], "names a modality twice"),
        (["--task", "image->text", "--metrics", "bleu"], "there is no such metric; there are exact, cider"),
        (["--task", "image->text", "--metrics", "speaker"], "scores speech, which image->text does not give"),
        (["--task", "text->speech", "--metrics", "wer"], "name it with --recogniser"),
        (["--task", "image->text", "--metrics", "clip"], "name it with --clip"),
        (["--task", "image->text", "--clip", "no/such/folder"], "no/such/folder: cannot be loaded as a clip model"),
        (["--task", "image->text", "--column", "image=ignore"], "no row has image, rows hold music, speech, text"),
        (
            ["--task", "image->text", "--column", "caption=ignore", "--metrics", "cider"],
            "items has text to compare with",
        ),
        (
            ["--task", "image->text", "--num", "1", "--seed", "5", "--metrics", "cider"],
            "cider: needs 2 items with text at least, has 1; raise --num",
        ),
        (["--task", "image->text", "--candidates", "1"], "ranking needs 2 at least"),
    ],
)
def test_wrong_use(source: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, source, *arguments)


def test_other_sources_and_folders(source: Path, dialogues: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds dialogues" in refused(capsys, dialogues, "--task", "image->text")
    assert "no such file or folder" in refused(capsys, source / "none.csv", "--task", "image->text")
    assert "the folder of the source" in refused(capsys, source, "--task", "image->text", "--out", source)


def test_a_missing_package_is_named(nano: UnifiedModel, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyglot_recipes.data_eval.table.find_spec", lambda name: None)
    with pytest.raises(ManifestError, match=r"jiwer is not installed; run: pip install 'anyglot\[synth\]'"):
        evaluate_data(nano, source, "speech->text", metrics=["wer"])
    assert read_task("text+image -> speech", nano, "nano") == Task(("text", "image"), "speech")
    assert Settings().candidates == 10


def test_places_and_devices_that_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        write_image(tmp_path / "photos" / name / "a.png", torch.rand(3, 64, 64))
    asked = (tmp_path / "photos", "--task", "image->text", "--model", NANO)
    assert "is in the folder of the source" in refused(capsys, *asked, "--out", tmp_path / "photos" / "report")
    assert not (tmp_path / "photos" / "report").exists()
    assert "--device nowhere: " in refused(capsys, *asked, "--device", "nowhere")


def test_only_files_that_were_written_are_linked() -> None:
    item = {"item": "a", "given": {"text": "media/<img src=x>"}, "output": "media/b.png", "answered": True}
    item |= {"references": ["media/<b>.png"], "scores": {}}
    report = {"task": "text->text", "source": "s", "model": "m", "items": [item], "settings": {"seed": 0}, "rows": []}
    page = markdown(report | {"left_out": {"rows": 0}})
    assert "<" not in page.partition("## Examples")[2].replace("\\<", "") and "](media" not in page
