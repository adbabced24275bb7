"""The catalogue: every entry leads to a class, licences are judged right, and folders find their class."""

import importlib
import json
import warnings

import pytest

from anyglot_tokenizers import CheckpointError, LicenseWarning, load
from anyglot_tokenizers.catalog import CATALOG, CONFIG_KEYS, MODEL_TYPES, home_of, is_commercial, warn_about
from anyglot_tokenizers.published import PublishedTokenizer


def test_every_home_is_a_published_tokenizer():
    for home in {*(entry.home for entry in CATALOG), *MODEL_TYPES.values(), *CONFIG_KEYS.values()}:
        module, _, name = home.partition(":")
        assert issubclass(getattr(importlib.import_module(module), name), PublishedTokenizer)


def test_entries_are_unique_and_say_how_to_get_them():
    assert len({entry.name for entry in CATALOG}) == len(CATALOG)
    assert all(entry.hub_id or entry.convert for entry in CATALOG)
    assert all(bool(entry.file) == bool(entry.hub_id and entry.convert) for entry in CATALOG)
    assert all(entry.sample_rate is None or entry.bitrate for entry in CATALOG)


@pytest.mark.parametrize("license", ["mit", "apache-2.0", "cc-by-4.0", "cc-by-sa-4.0", "deepseek"])
def test_commercial(license):
    assert is_commercial(license)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about("x", license)


@pytest.mark.parametrize(
    "license",
    [
        "",
        "unknown",
        "other",
        "None",
        "cc-by-nc-4.0",
        "CC-BY-NC-SA-4.0",
        "CC BY-NC 4.0",
        "non-commercial",
        "proprietary",
        "apple-amlr",
        "chameleon-research-license",
    ],
)
def test_not_commercial(license):
    assert not is_commercial(license)
    with pytest.warns(LicenseWarning, match="licence"):
        warn_about("x", license)


def test_homes():
    assert home_of({"model_type": "mimi", "ddconfig": {}}) == MODEL_TYPES["mimi"]
    assert home_of({"vq_strides": [4, 2, 1]}) == CONFIG_KEYS["vq_strides"]
    assert home_of({"model_type": "bert"}) is None
    assert home_of({}) is None


@pytest.mark.parametrize("entries", [{"model_type": "bert"}, {"model_type": ["x"]}, {"vq_strides": 3}, [], {}])
def test_other_folders_are_refused_in_one_line(tmp_path, entries):
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_pickles_are_refused_and_the_way_out_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vq_strides": [4, 2, 1]}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(CheckpointError, match="anyglot tokenizer convert"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("hub_id", "files", "kind"),
    [
        ("hubertsiuzdak/snac_24khz", ["pytorch_model.bin"], "snac"),
        ("FoundationVision/LlamaGen", ["vq_ds16_c2i.pt", "vq_ds8_c2i.pt"], "vqgan"),  # has no config.json
    ],
)
def test_a_hub_id_that_has_only_a_pickle_names_it_and_the_way_out(hub_id, files, kind, tmp_path, monkeypatch):
    def give(name, file, revision=None):
        if kind == "vqgan":
            raise FileNotFoundError(file)
        (tmp_path / file).write_text(json.dumps({"vq_strides": [4, 2, 1]}))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", give)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(CheckpointError, match=f"anyglot tokenizer convert {files[0]} --kind {kind} --out") as caught:
        load(hub_id)
    assert hub_id in str(caught.value) and all(file in str(caught.value) for file in files)
    assert "again" not in str(caught.value)
