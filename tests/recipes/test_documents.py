"""Documents beyond pairs: plain text is cut to fit a row and comes back whole; interleaved samples learn everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anyglot_lm.segments import Template
from anyglot_lm.shards import ShardReader
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.cli import main
from anyglot_recipes.documents import interleaved, text_documents, write_text_shards
from anyglot_tokenizers.errors import ManifestError

STORY = (
    "A red circle. A blue square! Is it large?\nIt is at the top left of the picture.\n\n"
    "The second paragraph, after an empty line, is about two small green triangles and a white one.\n\n\n"
    "  An indented line\twith a tab.  Two  spaces.  The end"
)


def contents(text: str, model: UnifiedModel, max_ids: int) -> list[str]:
    """What the documents say; every one of them fits, measured on the ids that are written."""
    found = []
    for sample in text_documents(text, model.text, max_ids):
        ids, loss = Template().render(sample, model.vocabulary, model.text)
        assert len(ids) <= max_ids
        assert loss.sum() == len(ids) - 2, "all is learnt but bos and the role"
        (segment,) = sample.segments
        assert segment.modality == "text" and isinstance(segment.content, str)
        found.append(segment.content)
    return found


@pytest.mark.parametrize("max_ids", [12, 20, 33, 64, 500])
def test_no_character_is_lost(max_ids: int, tiny_model: UnifiedModel) -> None:
    found = contents(STORY, tiny_model, max_ids)
    assert "".join(found) == STORY
    assert all(text.strip() for text in found)


def test_texts_of_random_words_come_back(tiny_model: UnifiedModel) -> None:
    rng = np.random.default_rng(0)
    characters = np.array([*"aeiourstln" * 3, *"  ,.!?\n\té日🙂"])
    for _ in range(40):
        text = "x" + "".join(rng.choice(characters, size=int(rng.integers(1, 200)))) + "x"
        found = contents(text, tiny_model, int(rng.integers(10, 60)))
        # Only what is blank may be left out, and only where a document would hold nothing else.
        assert "".join("".join(found).split()) == "".join(text.split())


def test_what_fits_is_one_document(tiny_model: UnifiedModel) -> None:
    room = len(tiny_model.text.encode(STORY)) + 3
    assert contents(STORY, tiny_model, room) == [STORY]
    assert len(contents(STORY, tiny_model, room - 1)) == 2


@pytest.mark.parametrize(
    ("first", "begun", "rest"),
    [
        ("aa bb.\n\n", "cc dd.\n", "ee."),  # a paragraph, and one of two lines
        ("aa bb.\n", "cc dd. ", "ee."),  # a line, and one of two sentences
        ("aa bb. ", "cc ", "dd."),  # a sentence, and one of two words
        ("aaaaa ", "b", "bb"),  # two words
    ],
)
def test_a_cut_keeps_whole_what_it_can(first: str, begun: str, rest: str, tiny_model: UnifiedModel) -> None:
    """The row has room for the beginning of the second part, which still comes whole in the next row."""
    room = len(tiny_model.text.encode(first + begun)) + 3
    assert contents(first + begun + rest, tiny_model, room) == [first, begun + rest]


def test_a_word_longer_than_a_row_is_cut_and_comes_back(tiny_model: UnifiedModel) -> None:
    word = "".join(chr(ord("a") + i * i % 26) for i in range(1000))
    found = contents(f"before {word} after", tiny_model, 40)
    assert "".join(found) == f"before {word} after"
    assert len(found) > 20


@pytest.mark.parametrize("blank", ["", " ", "\n\n\n", " \n" * 500])
def test_a_blank_text_gives_no_document(blank: str, tiny_model: UnifiedModel) -> None:
    assert contents(blank, tiny_model, 20) == []


def test_an_interleaved_sample_holds_all_rows_in_order_and_learns_them(tiny_model: UnifiedModel) -> None:
    pictures = [np.full((1, 4, 4), value) for value in (3, 7)]
    sample = interleaved([[("text", "red"), ("image", pictures[0])], [("image", pictures[1]), ("text", "blue")]])
    assert [segment.modality for segment in sample.segments] == ["text", "image", "image", "text"]
    ids, loss = Template().render(sample, tiny_model.vocabulary, tiny_model.text)
    assert loss.tolist() == [False, False] + [True] * (len(ids) - 2)
    assert Template().parse(ids, tiny_model.vocabulary, tiny_model.text).segments == sample.segments


def test_prepared_rows_also_make_documents_of_several(
    tiny_model: UnifiedModel, prepare_photos: list[str], tmp_path: Path
) -> None:
    """`anyglot prepare --interleave 2`, from photos to shards."""
    assert main([*prepare_photos, "--interleave", "2"]) == 0
    reader = ShardReader(tmp_path / "out" / "shards")
    tasks = [reader.task_names[t] for t in reader.tasks]
    assert tasks.count("interleaved") == 2 and tasks.count("image->text") == tasks.count("text->image") == 5
    for number in (i for i, task in enumerate(tasks) if task == "interleaved"):
        ids, loss = reader.doc(number)
        sample = Template().parse(ids, tiny_model.vocabulary, tiny_model.text)
        assert [s.modality for s in sample.segments] == ["image", "text"] * 2 and loss[2:].all()
    assert main(prepare_photos) == 0
    assert "interleaved" not in ShardReader(tmp_path / "out" / "shards").task_names


def test_text_shards_hold_every_file_in_the_model_s_ids(tiny_model: UnifiedModel, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text(STORY, encoding="utf-8")
    files[1].write_text("ça va? 日本語 🙂", encoding="utf-8")
    number = write_text_shards(files, tmp_path / "model", tmp_path / "out", max_ids=40)
    reader = ShardReader(tmp_path / "out")
    assert len(reader) == number > 3
    assert reader.task_names == ["text"]
    assert reader.vocabulary.fingerprint == tiny_model.vocabulary.fingerprint
    docs = [reader.doc(i)[0] for i in range(number)]
    assert max(map(len, docs)) <= 40
    size = tiny_model.vocabulary.text_size
    texts = [tiny_model.text.decode([i for i in ids.tolist() if i < size]) for ids in docs]
    assert "".join(texts) == STORY + "ça va? 日本語 🙂"


def test_a_file_that_is_no_utf_8_is_one_clear_error_and_leaves_nothing(
    tiny_model: UnifiedModel, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    (tmp_path / "good.txt").write_text("a red circle", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ManifestError, match=r"latin\.txt: byte 3 is no UTF-8; .*iconv"):
        write_text_shards([tmp_path / "good.txt", tmp_path / "latin.txt"], tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out" / "meta.json").exists()
