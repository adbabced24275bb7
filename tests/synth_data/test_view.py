"""The pages: everything is on them, nothing of it runs, every link leads to a file."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from anyglot_synth.dataset import DatasetError, media_of, read_items
from anyglot_synth.view import _near, write_view


class Page(HTMLParser):
    """What a browser would see: tags, files that are asked for, texts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def files(self) -> list[str]:
        return [value for _, given in self.tags for key, value in given.items() if key in ("src", "href") and value]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [given for name, given in self.tags if name == tag]


def test_everything_is_on_the_page_and_nothing_runs(dialogues: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(dialogues, tmp_path / "mine")
    path = write_view(mine)
    page = Page(path)
    texts = " ".join(page.texts)
    assert [article["id"] for article in page.all("article")] == ["i0", "i1", "i2", "i3", "i4"], "in source order"
    for word in ("what is at number two", "written: What's at no. 2?", "1.0 > 0.3", "may be tried again", "not made"):
        assert word in texts
    assert "<script>document.title = 'x'</script> \"quoted\"" in texts, "shown as it is"
    assert len(page.all("script")) == 1 and "document.title" not in page.all("script")[0]
    assert len(page.all("audio")) == 6 and len(page.all("img")) == 2 and "MIDI" in texts
    assert all(image["class"] == "tiny" and image["width"] == "192" for image in page.all("img"))
    for file in page.files():
        assert "://" not in file and not file.startswith("/")
        assert file.startswith("#") or (path.parent / unquote(file)).is_file(), file
    assert {option.get("value") for option in page.all("option")} >= {"spoken-chat", "caption", "text->music", "chat"}
    files = {medium.file.file for item in read_items(mine) for medium in media_of(item.dialogue)}
    assert files <= {unquote(file).removeprefix("../") for file in page.files()}


def test_pages_and_the_search_over_them(dialogues: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(dialogues, tmp_path / "mine")
    write_view(mine, per_page=2)
    pages = [Page(mine / "view" / name) for name in ("index.html", "page-2.html", "page-3.html")]
    found = [[article["id"] for article in page.all("article")] for page in pages]
    assert found == [["i0", "i1"], ["i2", "i3"], ["i4"]]
    script = (mine / "view" / "items.js").read_text()
    entries = json.loads(script.removeprefix("window.anyglotItems = ").removesuffix(";\n").replace(",\n]", "\n]"))
    assert [entry[:3] for entry in entries][:2] == [[1, "ok", "spoken-chat"], [1, "filtered", "chat"]]
    assert "what is at number two" in entries[0][3] and entries[4][0] == 3
    before = {path.name: path.read_bytes() for path in (mine / "view").iterdir()}
    write_view(mine, per_page=2)
    assert before == {path.name: path.read_bytes() for path in (mine / "view").iterdir()}
    write_view(mine, num=3, per_page=2)
    assert sorted(path.name for path in (mine / "view").iterdir()) == ["index.html", "items.js", "page-2.html"]
    with pytest.raises(DatasetError, match="at least 1"):
        write_view(mine, num=0)


def test_what_is_no_dataset_is_left_as_it_was(dialogues: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="none/job.json: cannot be read .*; give the folder of a finished dataset"):
        write_view(tmp_path / "none")
    (tmp_path / "mine").mkdir()
    for name in ("job.json", "samples.jsonl"):
        with pytest.raises(DatasetError, match=f"mine/{name}: .*; give the folder of a finished dataset"):
            write_view(tmp_path / "mine")
        assert not (tmp_path / "mine" / "view").exists()
        shutil.copy(dialogues / name, tmp_path / "mine" / name)
    assert write_view(tmp_path / "mine").is_file()


def test_a_name_that_leads_elsewhere_is_not_linked(dialogues: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(dialogues, tmp_path / "mine")
    text = (mine / "samples.jsonl").read_text()
    (mine / "samples.jsonl").write_text(re.sub(r'"file": "objects/[^"]+png"', '"file": "https://x.org/a.png"', text))
    page = Page(write_view(mine))
    assert not any("x.org" in file for file in page.files()) and len(page.all("img")) == 2


def test_many_pages_link_a_few() -> None:
    assert _near(1, 1) == [1] and _near(3, 5) == [1, 2, 3, 4, 5]
    near = _near(200, 400)
    assert {1, 198, 199, 200, 201, 202, 400} <= set(near) and len(near) <= 18
