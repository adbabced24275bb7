"""The benchmark's sections: hand-computed numbers, true controls, comparisons, and one run of everything."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from anyglot_lm.segments import Template
from anyglot_lm.unified import Output, UnifiedModel
from anyglot_recipes import benchmark_media
from anyglot_recipes.benchmark import SECTIONS, Bench, change_of, gap_of, hallucination, presence_items, read_sections
from anyglot_recipes.benchmark_media import WAYS, error_row, spoken_form
from anyglot_recipes.benchmark_report import as_markdown, as_text, compare, comparison_table, tables
from anyglot_recipes.cli import main
from anyglot_recipes.evaluate import GROUPS, Checkers, Graded, grade, group_of, means, row_of
from anyglot_recipes.nano import ASSISTANT_VOICE, written_questions
from anyglot_recipes.nano import test_items as held_out_items
from anyglot_recipes.shots import HELD_OUT, RULES
from anyglot_recipes.tasks import CHAINED, CHAT, PAIRS, QUIZ, SHOTS, TASKS, TURNED, WRITTEN, Item
from anyglot_synth.nanoworld.draw import draw
from anyglot_synth.nanoworld.language import describe, words
from anyglot_synth.nanoworld.listen import listen
from anyglot_synth.nanoworld.melody import render
from anyglot_synth.nanoworld.records import Record, generate
from anyglot_synth.nanoworld.scene import Scene, Thing, sample_scene, score
from anyglot_synth.nanoworld.see import see
from anyglot_synth.nanoworld.voices import installed_voices
from anyglot_tokenizers.audio import AudioCodec
from anyglot_tokenizers.errors import ManifestError

needs_voices = pytest.mark.skipif(
    ASSISTANT_VOICE not in {v.name for v in installed_voices()}, reason="the speech engine flite is not here"
)
RED = Thing("circle", "red", "large", "top", "left")


def items(num: int) -> list[Item]:
    rng = np.random.default_rng(0)
    return [Item(sample_scene(rng, "test"), "", {"image": np.zeros((1, 4, 4), int)}) for _ in range(num)]


def test_presence_is_asked_after_the_models_own_description(monkeypatch: pytest.MonkeyPatch) -> None:
    """Question i is about picture i, or as a control picture i + 1; the text before it is what was said of that."""
    asked: list[tuple[str, list[Item]]] = []

    def ask(self: Bench, of: list[Item], task: str) -> list[Graded]:
        asked.append((task, of))
        said = [f"said {item.codes['image'][0, 0, 0]}" if task == "image->text" else "yes" for item in of]
        found = [Graded(task, item, []) for item in of]
        for i, (graded, words_) in enumerate(zip(found, said, strict=True)):
            graded.heard, graded.score = [words_], float(task == QUIZ or i == 0)
        return found

    def about(first: int) -> list[Item]:
        return [replace(item, codes={"image": np.full((1, 4, 4), first + i)}) for i, item in enumerate(items(4))]

    monkeypatch.setattr(Bench, "ask", ask)
    bench = Bench(None, about(0), 0, None)  # type: ignore[arg-type]  # nobody answers, nobody grades
    bench.__dict__["seen"] = about(4)
    rows = hallucination(bench)
    assert [row["score"] for row in rows] == [0.25, 1.0] * 8
    assert [row.get("described") for row in rows] == [None, 0.25] * 8
    assert all(row["change"] == 0.75 and row["yes"] == 1.0 for row in rows[1::2])
    quizzes = [of for task, of in asked if task == QUIZ]
    assert len(quizzes) == 8 and [of for task, of in asked if task == WRITTEN] == quizzes
    for index, of in enumerate(quizzes):
        truth = presence_items(bench.items if index < 4 else bench.seen, index % 4 > 1, 0)
        for i, (item, true) in enumerate(zip(of, truth, strict=True)):
            picture = (i + index % 2) % 4 + 4 * (index > 3)
            assert item.codes["image"][0, 0, 0] == picture and item.text == f"said {picture}"
            assert item.quiz == [(true.written_question, true.written_answer)] and item.scene == true.scene
            assert item.written_question == true.written_question


def test_a_row_by_hand() -> None:
    row = row_of("image->text", [1.0] * 30 + [0.0] * 10, chance=0.5, ceiling=1.0, missing=0.25, note="x")
    assert (row["n"], row["score"], row["chance"], row["corrected"], row["missing"]) == (40, 0.75, 0.5, 0.5, 0.25)
    # A share p of n answers: the 95 % interval is about p -+ 1.96 sqrt(p (1 - p) / n).
    half = 1.96 * np.sqrt(0.75 * 0.25 / 40)
    assert row["low"] == pytest.approx(0.75 - half, abs=0.03) and row["high"] == pytest.approx(0.75 + half, abs=0.03)
    assert row_of("a", [0.5] * 9)["low"] == row_of("a", [0.5] * 9)["high"] == 0.5
    assert "corrected" not in row_of("a", [1.0]) and sum(row["scores"]) == 30
    assert row_of("a", [1.0, 0.0], weights=[3, 1])["score"] == 0.75


def test_differences_by_hand() -> None:
    assert change_of([0.25] * 8) == {"change": 0.25, "change_low": 0.25, "change_high": 0.25}
    found, low, high = gap_of([1.0, 0.0] * 100, [0.0] * 50).values()
    assert found == 0.5 and low == pytest.approx(0.5 - 1.96 / 2 / np.sqrt(200), abs=0.01) and high > 0.55
    assert gap_of([1.0] * 5, [0.5] * 3) == change_of([0.5] * 4)


def test_groups_and_means() -> None:
    groups: dict[str, list[str]] = {}
    for task in TASKS:
        groups.setdefault(group_of(task), []).append(task)
    assert groups["understanding"] == ["image->text", "speech->text", "music->text"]
    assert groups["generation"] == ["text->image", "text->speech", "text->music"]
    assert groups["cross-modal understanding"] == ["image+text->text"]
    assert len(groups["cross-modal generation"]) == 9
    rows = [{"task": t, "score": s, "group": group_of(t)} for t, s in ((PAIRS[0], 1.0), (PAIRS[1], 0.5), (WRITTEN, 0))]
    assert set(groups) == set(GROUPS)
    assert means(rows) == {"mean": 0.75, "groups": {"generation": 0.75, "cross-modal understanding": 0}}


def test_an_answer_without_content_is_missing() -> None:
    checkers, pictures = Checkers(), torch.rand(3, 64, 64)
    two = items(5)
    outputs = [[Output("text", text=""), Output("image", media=pictures)], [], [Output("text", text=" ")]]
    outputs += [[Output("text", text="no"), Output("image", media=pictures)], [Output("image")]]
    assert [g.missing for g in grade(two, "speech->text", outputs, checkers)] == [True, True, True, False, True]
    assert [g.missing for g in grade(two, "text->image", outputs, checkers)] == [False, True, True, False, True]


def test_chains_are_graded_by_their_end_and_rules_by_order() -> None:
    item = replace(items(1)[0], question="what color is it?", answer="red")
    said = [Output("text", text="what color is it?"), Output("text", text="red")]
    (g,) = grade([item], CHAINED, [said], Checkers())
    assert g.score == 0 and g.missing and g.heard == [""]
    item = replace(item, shown=[(RED, np.zeros(1))], rule=("color", "shape"))
    verdicts = [
        grade([item], SHOTS, [[Output("text", text=t)]], Checkers())[0].score for t in ("Red circle.", "circle red")
    ]
    assert verdicts == [1, 0]
    both = [
        Output("text", text="what color is it?"),
        Output("text", text="red"),
        Output("speech", media=torch.zeros(1, 0)),
    ]
    (g,) = grade([item], "speech+image->text+text+speech", [both], Checkers())
    assert g.heard == [""] and len(g.scenes) == 1  # by its end, too
    (g,) = grade([replace(item, second_answer="two")], CHAT, [[Output("speech", media=torch.zeros(1, 0))]], Checkers())
    assert g.score == 0 and g.missing


@pytest.mark.parametrize("hard", [False, True])
def test_questions_of_presence_are_balanced_and_true(hard: bool) -> None:
    asked = presence_items(items(200), hard, seed=1)
    assert [i.written_answer for i in asked[:4]] == ["yes", "no"] * 2
    for item in asked:
        named = set(words(item.written_question)) - {"is", "there", "a", "thing"}
        fits = [len(named & {t.shape, t.color, t.size}) for t in item.scene.things]
        assert (max(fits) == len(named)) == (item.written_answer == "yes")
        assert not hard or max(fits) >= len(named) - 1
    assert asked[0].written_question == presence_items(items(200), hard, seed=1)[0].written_question
    half = written_questions([item.scene for item in asked], np.random.default_rng(0))
    assert [answer for q, answer in half if q.startswith("is there")] == ["yes", "no"] * 50


def test_word_errors_are_of_what_is_said() -> None:
    said = "large red circle, top left"
    assert spoken_form("at the top left is a large red circle") == "large red circle top left"
    assert spoken_form("there is a red hat") == "red hat"
    heard = ["a large red circle at the top left", "large blue circle top left", "", "top left"]
    row = error_row("speech->text", "a voice", [said] * 4, heard)
    assert row["scores"] == [0, 0.2, 1, 0.6] and row["score"] == pytest.approx(1.8 / 4)
    other = "small green cross, top left. large red circle, top right"
    row = error_row("speech->text", "a voice", [said, other], ["", other])
    assert row["score"] == pytest.approx(5 / 15, abs=1e-4), "errors over words, not a mean of rates"


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return list(generate("test", 12, 5, parts=("image", "music")))


def test_spoiled_pictures_can_still_be_read(records: list[Record]) -> None:
    for name, way in WAYS["image"].items():
        made = [way(record, np.random.default_rng(record.index)) for record in records]
        again = [way(record, np.random.default_rng(record.index)) for record in records]
        for record, one, two in zip(records, made, again, strict=True):
            assert one.dtype == np.uint8 and one.shape == record.image.shape and np.array_equal(one, two)
            assert not np.array_equal(one, record.image), name
        assert np.mean([score(r.scene, see(m)) for r, m in zip(records, made, strict=True)]) > 0.97, name


def test_how_pictures_are_drawn_otherwise() -> None:
    scene = Scene((RED,))
    plain, lighter = draw(scene), draw(scene, background=(48, 48, 56))
    assert tuple(lighter[0, 63]) == (48, 48, 56) and tuple(plain[0, 63]) == (24, 24, 32)
    assert tuple(lighter[12, 12]) == tuple(plain[12, 12])
    whole = draw(scene, offset=(1, 0))
    assert np.array_equal(whole[:, 1:], plain[:, :-1]) and not np.array_equal(draw(scene, offset=(0.5, 0.5)), plain)


def test_spoiled_sounds() -> None:
    scene = Scene((RED,))
    clean = render(scene)
    record: Any = type("R", (), {"speech": clean, "music": clean})
    for snr in (20, 10):
        noise = WAYS["speech"][f"noise, {snr} dB SNR"](record, np.random.default_rng(0)) - clean
        assert 10 * np.log10((clean**2).mean() / (noise**2).mean()) == pytest.approx(snr, abs=0.5)
    softer = WAYS["speech"]["12 dB softer"](record, np.random.default_rng(0))
    assert 20 * np.log10(softer.std() / clean.std()) == pytest.approx(-12, abs=1e-3)
    sharp = WAYS["music"]["30 cents sharp"](record, np.random.default_rng(0))
    assert len(clean) / len(sharp) == pytest.approx(2 ** (30 / 1200), rel=1e-3)
    assert score(scene, listen(sharp, 16000)) == 1


def report(scores: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    rows = [{"section": "shots", **row_of("shots", s, condition=name)} for name, s in scores.items()]
    return {"benchmark": "nanoworld", "num": 40, "seed": 0, "scenes": "a", "judge": "own", "rows": rows, **more}


def test_comparing_by_hand() -> None:
    first = {"better": [0.0, 1.0] * 20, "same": [0.0, 1.0] * 20, "gone": [1.0] * 40}
    second = {"better": [0.5, 1.0] * 20, "same": [1.0, 0.0] * 20}
    found = compare({"a": report(first), "b": report(second)})
    better, same, gone = found["rows"]
    assert better["scores"] == [0.5, 0.75] and gone["scores"] == [1, None] and gone["differences"] == [None]
    (d,) = better["differences"]
    assert d["change"] == 0.25 and d["significant"] and d["better"]
    # Half of 40 differences are 0.5, half 0: their mean has a standard error of 0.25 / sqrt(40).
    assert d["change_low"] == pytest.approx(0.25 - 1.96 * 0.25 / np.sqrt(40), abs=0.02)
    assert same["differences"][0]["change"] == 0 and not same["differences"][0]["significant"]
    shown = as_text([comparison_table(found)])
    assert "* better" in shown and shown.count("*") == 2, "one in the title"


def test_less_is_better_for_word_errors() -> None:
    said = ["large red circle, top left"] * 9
    worse = error_row("speech->text", "v", said, ["large red circle"] * 9)
    best = error_row("speech->text", "v", said, said)
    found = compare({"a": report({}, rows=[best]), "b": report({}, rows=[worse])})
    (d,) = found["rows"][0]["differences"]
    assert d == {"change": 0.4, "change_low": 0.4, "change_high": 0.4, "significant": True, "better": False}
    assert "worse" in as_text([comparison_table(found)])


def test_comparing_knows_the_mean_of_the_pairs() -> None:
    rows = [{"section": "directions", "group": "g", **row_of(task, [i / 12, 1.0])} for i, task in enumerate(PAIRS)]
    found = compare({"a": report({}, rows=rows), "b": report({}, rows=rows)})
    assert found["rows"][0]["task"] == "the 12 pairs"
    assert found["rows"][0]["scores"][0] == pytest.approx((11 / 24 + 1) / 2, abs=1e-3)


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def compared(*contents: Any) -> str:
        files = [tmp_path / f"{i}.json" for i in range(len(contents))]
        for file, content in zip(files, contents, strict=True):
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        assert main(["eval", "nanoworld", "--compare", *map(str, files)]) == 2
        return capsys.readouterr().err

    good = report({"x": [1.0, 0.0]})
    assert "seed is 0 in 0 and 3 in 1" in compared(good, {**good, "seed": 3})
    assert "no report" in compared(good, {"rows": []})
    assert "is no JSON" in compared(good, "{")
    assert "two at least" in compared(good)
    assert "other items" in compared(good, report({"x": [1.0]}))
    (tmp_path / "more").mkdir()
    assert main(["eval", "nanoworld", "--compare", str(tmp_path / "more")]) == 2
    assert main(["eval", "nanoworld", "--compare", str(tmp_path / "none.json"), str(tmp_path / "0.json")]) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--guidance", "speech=nan"], "invalid scales value"),
        (["--compare", "a.json", "--out", "there"], "--compare writes no --out"),
    ],
)
def test_options_that_cannot_be(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["eval", "nanoworld", *given])
    except SystemExit as stopped:  # argparse's own way
        code = int(str(stopped.code))
    assert code == 2 and message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_shows_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the work had begun")

    monkeypatch.setattr(UnifiedModel, "from_pretrained", load)
    (tmp_path / "file").touch()
    assert main(["eval", "nanoworld", "--out", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


def test_codecs_of_another_rate_are_refused(tiny_model: UnifiedModel) -> None:
    music = AudioCodec(sample_rate=24_000, n_fft=64, hop=16, num_mels=12, dim=16, encoder_depth=1, decoder_depth=1)
    other = SimpleNamespace(tokenizers={**tiny_model.tokenizers, "music": music}, vocabulary=tiny_model.vocabulary)
    with pytest.raises(ManifestError, match="of 16000 Hz; the tokenizer of music takes 24000 Hz"):
        held_out_items(cast(UnifiedModel, other), 1)


def test_sections_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_sections("all") == list(SECTIONS) and read_sections("shots, directions") == ["directions", "shots"]
    with pytest.raises(ManifestError, match="no section dreams; choose of directions"):
        read_sections("dreams,shots")
    with pytest.raises(SystemExit):
        main(["eval", "nanoworld", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in SECTIONS)


@needs_voices
@pytest.mark.parametrize("version", [1, 2])
def test_everything_with_an_untrained_model(
    version: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: UnifiedModel, capsys: Any
) -> None:
    monkeypatch.setenv("ANYGLOT_CACHE", str(tmp_path / "cache"))
    tiny = tiny_model
    model = UnifiedModel(tiny.model, tiny.vocabulary, Template(version=version), tiny.text, tiny.tokenizers)
    model.save_pretrained(tmp_path / "model")
    sections = "all"
    if version == 1:  # on a machine with one engine and no pocketsphinx
        sections = "speech,chains,shots,order"
        monkeypatch.setattr(benchmark_media, "guest_voices", tuple)
        monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    arguments = ["eval", "nanoworld", "--model", str(tmp_path / "model"), "--num", "2", "--sections", sections]
    arguments += ["--candidates", "2"]
    arguments += ["--guidance", "speech=2,image=1.5"] if version == 1 else []
    assert main([*arguments, "--out", str(tmp_path / "a"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "a" / "report.json").read_text()) == printed
    assert printed["guidance"] == ({"speech": 2.0, "image": 1.5} if version == 1 else {})
    rows = printed["rows"]
    keys = [(row["section"], row["task"], row["condition"]) for row in rows]
    assert len(set(keys)) == len(keys) and {row["section"] for row in rows} == set(read_sections(sections))
    for row in rows:
        if "skipped" in row:
            continue
        assert len(row["scores"]) == row["n"] in (1, 2)
        assert 0 <= row["low"] <= row["score"] <= row["high"]
    if version == 1:
        skipped = {row["condition"] or row["task"]: row["skipped"] for row in rows if "skipped" in row}
        assert set(skipped) == {"voices never heard", "pocketsphinx", CHAINED, "speech+image->text+text+speech"}
        assert "template is version 1" in skipped[CHAINED] and "not installed" in skipped["pocketsphinx"]
        assert "pip install espeakng-loader" in skipped["voices never heard"]
        assert all(why in (tmp_path / "a" / "report.md").read_text() for why in skipped.values())
        return
    counts = {name: sum(row["section"] == name for row in rows) for name in SECTIONS}
    assert counts["directions"] == 16 and counts["composition"] == 13 and counts["attributes"] == (13 + 9) * 5
    assert counts["hallucination"] == 16 and counts["robustness"] == 3 + sum(map(len, WAYS.values()))
    assert [counts[name] for name in ("through", "checked", "chains", "chat", "shots", "order")] == [7, 10, 5, 2, 4, 4]
    assert {row["task"]: row["against"] for row in rows if row["section"] == "order"} == TURNED
    assert counts["speech"] >= 8 and counts["checked"] == sum(row["condition"] == "best of 2" for row in rows)
    assert {"generated, heard by own judge", "generated, best of 2, heard by own judge"} <= {
        r["condition"] for r in rows
    }
    real = [row for row in rows if row["condition"] == "real, heard by own judge"]
    assert real[0]["score"] == 0 and real[0]["measure"] == "word errors"
    clean = {row["task"]: row["scores"] for row in rows if row["condition"].endswith(": clean")}
    told = {row["task"]: row["scores"] for row in rows if row["section"] == "directions"}
    assert all(told[task] == scores for task, scores in clean.items())
    page = (tmp_path / "a" / "index.html").read_text()
    for source in page.split("src='")[1:]:
        assert (tmp_path / "a" / source.split("'")[0]).stat().st_size > 0
    assert "skipped" not in page
    links = {part.split("'")[0] for part in page.split("href='#")[1:]}
    assert links == {part.split("'")[0] for part in page.split("<h2 id='")[1:]}
    assert {"speech-to-image-and-speech", "shots-2-examples-rules-never-seen", "hallucination-hard-negatives"} <= links
    assert as_markdown(tables(rows)) in (tmp_path / "a" / "report.md").read_text()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "report.json").write_text(json.dumps(printed))
    assert main(["eval", "nanoworld", "--compare", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reports"] == ["a", "b"] and len(found["rows"]) == len(rows) + 1
    assert not any(d["significant"] or d["change"] for row in found["rows"] for d in row["differences"])


def test_rules_of_the_two_groups_differ() -> None:
    assert not {tuple(sorted(rule)) for rule in HELD_OUT} - {tuple(sorted(rule)) for rule in RULES}
    assert describe(Scene((RED,)), None, "spoken") == "large red circle, top left"
