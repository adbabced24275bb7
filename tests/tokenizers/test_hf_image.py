"""Emu3, Janus and Chameleon: codes and pixels of transformers, from whole models and from the tokenizer alone."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from anyglot_tokenizers import CheckpointError, Codes, CodesError, FingerprintError, MediaError, load
from anyglot_tokenizers.errors import LicenseWarning, UnsupportedError
from anyglot_tokenizers.hf_image import ChameleonImage, Emu3Image, JanusImage, PublishedImageVQ

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::anyglot_tokenizers.errors.LicenseWarning")

VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 8192, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 2}
CLASSES = {"Emu3": Emu3Image, "Janus": JanusImage, "Chameleon": ChameleonImage}
NAMES = tuple(CLASSES)


def build(name):
    """A whole model of the kind that is published, small and random."""
    if name == "Emu3":
        vq = VQ | {"attn_resolutions": [1], "hidden_size": 32, "codebook_size": 64}
        config = {"vq_config": vq, "text_config": TEXT | {"pad_token_id": 0}, "vocabulary_map": {"<image>": 3}}
    elif name == "Janus":
        vq = VQ | {"latent_channels": 16, "num_embeddings": 64, "projection_dim": 32, "image_token_embed_dim": 32}
        vision = VISION | {"projection_dim": 32, "depth": 1}
        config = {"vq_config": vq, "text_config": TEXT | {"model_type": "llama"}, "vision_config": vision}
    else:
        vq = VQ | {"latent_channels": 16, "embed_dim": 16, "num_embeddings": 64, "resolution": 16}
        config = TEXT | {"vq_config": vq, "vocabulary_map": {"<image>": 3}}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**config)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    model.model.vqmodel.quantize.embedding.weight.data.normal_(std=0.5)
    for module in model.model.vqmodel.modules():
        if isinstance(module, torch.nn.Conv2d) and name != "Emu3":  # lively codes
            torch.nn.init.kaiming_uniform_(module.weight)
        if isinstance(module, torch.nn.BatchNorm3d):  # as after training: in train mode the codes would differ
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model


@pytest.fixture(scope="module")
def models():
    return {name: build(name) for name in NAMES}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """Whole models in shards, as published: the tokenizer under a prefix, some shards without any of it."""
    root = tmp_path_factory.mktemp("published")
    for name, model in models.items():
        model.save_pretrained(root / name, max_shard_size="400KB")
        assert not (root / name / "model.safetensors").exists()
    return {name: root / name for name in NAMES}


def images(count=2, height=16, width=24, seed=1):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def reference_codes(name, model, x):
    vq, pixels = model.model.vqmodel, x * 2 - 1
    with torch.no_grad():
        if name == "Emu3":
            return torch.stack(vq.encode(pixels, torch.tensor([x.shape[2:]] * len(x))).image_tokens)
        return vq.encode(pixels).image_tokens.view(len(x), x.shape[2] // 2, x.shape[3] // 2)


def shards_of(folder):
    table = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {shard for name, shard in table.items() if "vqmodel" in name}, set(table.values())


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_those_of_transformers(models, folders, name):
    tokenizer = load(folders[name])
    assert type(tokenizer) is CLASSES[name] and isinstance(tokenizer, PublishedImageVQ)
    if name == "Janus":
        tokenizer.cosine = False
    x = images()
    codes = tokenizer.encode(x)
    expected = reference_codes(name, models[name], x)
    assert codes.codes.shape == (2, 1, 8, 12) == (2, 1, *tokenizer.spec.grid(16, 24))
    assert torch.equal(codes.codes[:, 0], expected) and expected.unique().numel() > 10
    assert codes.spec == tokenizer.spec and codes.spec.codebook_size == 64 and codes.spec.downsample_factor == 2
    assert torch.equal(tokenizer.encode(x[1:]).codes, codes.codes[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.train().encode(x).codes, codes.codes)
    assert not tokenizer.training and tokenizer.encode(x, num_quantizers=1).codes.shape == codes.codes.shape


@pytest.mark.parametrize("name", ("Emu3", "Janus"))
def test_pixels_are_those_of_transformers(models, folders, name):
    tokenizer = load(folders[name])
    ids = torch.randint(64, (2, 1, 8, 8), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = models[name].model.vqmodel.decode(ids[:, 0] if name == "Emu3" else ids.flatten(1))
    x = tokenizer.decode(ids)
    assert x.shape == (2, 3, 16, 16) and 0 <= x.min() < x.max() <= 1
    assert torch.allclose(x, (expected / 2 + 0.5).clamp(0, 1), atol=1e-5)
    assert torch.allclose(tokenizer.decode(Codes(ids, None, tokenizer.spec))[:1], tokenizer.decode(ids[:1]), atol=1e-5)
    assert tokenizer.decode(ids[:, :, :4]).shape == (2, 3, 8, 16)


def test_janus_searches_by_direction(models, folders):
    """Against the published formula: unit latents, unit entries, least squared distance."""
    tokenizer, vq, x = load(folders["Janus"]), models["Janus"].model.vqmodel, images()
    with torch.no_grad():
        z = F.normalize(vq.quant_conv(vq.encoder(x * 2 - 1)), dim=1).permute(0, 2, 3, 1)
        expected = torch.cdist(z.flatten(0, 2), F.normalize(vq.quantize.embedding.weight, dim=1)).argmin(1)
    codes = tokenizer.encode(x).codes
    assert torch.equal(codes.flatten(), expected)
    assert (codes[:, 0] != reference_codes("Janus", models["Janus"], x)).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_the_tokenizer_alone(models, folders, name, tmp_path):
    models[name].model.vqmodel.save_pretrained(tmp_path)
    assert load(tmp_path).fingerprint == load(folders[name]).fingerprint


@pytest.mark.parametrize("prefix", ("", "vqmodel.", "model.vqmodel."))
def test_any_prefix_and_precision(models, folders, prefix, tmp_path):
    """Prefixes have changed between versions of transformers; many models come in bfloat16, small ones in one file."""
    tensors = {prefix + name: tensor for name, tensor in models["Emu3"].model.vqmodel.state_dict().items()}
    other = {"lm_head.weight": torch.zeros(2)} if prefix else {}
    (tmp_path / "config.json").write_text((folders["Emu3"] / "config.json").read_text())
    save_file(tensors | other, tmp_path / "model.safetensors")
    assert load(tmp_path).fingerprint == load(folders["Emu3"]).fingerprint
    half = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(half | other, tmp_path / "model.safetensors")
    tokenizer = load(tmp_path)
    assert {parameter.dtype for parameter in tokenizer.parameters()} == {torch.float32}
    assert torch.equal(tokenizer.model.encoder.conv_in.weight, half[prefix + "encoder.conv_in.weight"].float())


def test_only_shards_of_the_tokenizer_are_read(folders, tmp_path):
    needed, every = shards_of(folders["Emu3"])
    assert needed < every
    for file in ("config.json", "model.safetensors.index.json", *needed):
        (tmp_path / file).write_bytes((folders["Emu3"] / file).read_bytes())
    assert load(tmp_path).fingerprint == load(folders["Emu3"]).fingerprint


def test_a_decoder_chameleon_has_no_use_for(folders, tmp_path):
    index = json.loads((folders["Chameleon"] / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["model.vqmodel.quantize.embedding.weight"]
    for file in folders["Chameleon"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(
        load_file(folders["Chameleon"] / shard) | {"model.vqmodel.decoder.conv_in.weight": torch.zeros(2)},
        tmp_path / shard,
    )
    index["weight_map"]["model.vqmodel.decoder.conv_in.weight"] = shard
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer = load(tmp_path)
    assert tokenizer.fingerprint == load(folders["Chameleon"]).fingerprint and not tokenizer.spec.decodes
    with pytest.raises(UnsupportedError, match="only encodes"):
        tokenizer.decode(torch.zeros(1, 1, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize("name", NAMES)
def test_own_folder_form(folders, name, tmp_path):
    tokenizer = load(folders[name])
    tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again) is CLASSES[name] and again.spec == tokenizer.spec
    assert torch.equal(again.encode(images()).codes, tokenizer.encode(images()).codes)
    assert "text_config" not in (tmp_path / "config.json").read_text()  # the language model's config stays behind


def test_wrong_input(folders):
    tokenizer = load(folders["Emu3"])
    x = images()
    for bad in (x[0], x[:, :2], x[..., :23], x * 255, x - 1, (x * 255).byte(), x * torch.nan, x[:0]):
        with pytest.raises(MediaError):
            tokenizer.encode(bad)
    with pytest.raises(MediaError, match="lengths"):
        tokenizer.encode(x, torch.tensor([16, 16]))
    with pytest.raises(CodesError):
        tokenizer.encode(x, num_quantizers=2)
    ids = torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    for bad in (ids[0], ids.repeat(1, 2, 1, 1), ids + 64, ids - 1, ids.float(), ids[..., :0]):
        with pytest.raises(CodesError):
            tokenizer.decode(bad)
    with pytest.raises(FingerprintError):
        tokenizer.decode(load(folders["Chameleon"]).encode(x))
    with pytest.raises(UnsupportedError):
        tokenizer(x)


def test_wrong_folders(models, folders, tmp_path):
    source = folders["Janus"]
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config, index = json.loads((tmp_path / "config.json").read_text()), tmp_path / "model.safetensors.index.json"

    def refuses(match, **vq):
        (tmp_path / "config.json").write_text(json.dumps(config | {"vq_config": config["vq_config"] | vq}))
        with pytest.raises(CheckpointError, match=match):
            load(tmp_path)

    refuses("weights do not fit", num_embeddings=65)
    refuses("weights do not fit", base_channels=2**16)  # refused before it takes memory
    refuses("divisible", base_channels=33)
    refuses("not a JanusVQVAE config", channel_multiplier="wide")
    (tmp_path / "config.json").write_text(json.dumps(config))
    table = json.loads(index.read_text())
    shard = table["weight_map"]["model.vqmodel.quantize.embedding.weight"]
    for broken in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 3}}'):
        index.write_text(broken)
        with pytest.raises(CheckpointError):
            load(tmp_path)
    index.write_text(json.dumps(table))
    (tmp_path / shard).write_bytes((source / shard).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load(tmp_path)
    (tmp_path / shard).unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    torch.save(models["Janus"].state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        load(tmp_path)
    save_file({"model.layers.0.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="another model"):
        load(tmp_path)


def test_license_is_unknown_until_said(folders):
    with pytest.warns(LicenseWarning):
        assert load(folders["Janus"]).spec.license == "unknown"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as huggingface_hub needs to download."""

    root: Path
    asked: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if "/tree/" in path:
            files = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"} for f in self.root.iterdir()
            ]
            body = json.dumps(files).encode()
        elif path.startswith("/api/models/"):
            files = [{"rfilename": file.name} for file in self.root.iterdir()]
            body = json.dumps({"id": "owner/whole", "sha": "0" * 40, "siblings": files}).encode()
        else:
            file = self.root / path.rpartition("/")[2]
            body = file.read_bytes() if file.is_file() else None
            if self.command == "GET":
                self.asked.append(file.name)
        self.send_response(404 if body is None else 200)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("ETag", f'"{hash((path, body)) & 0xFFFFFFFF:x}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("sharded", (True, False))
def test_download_takes_only_what_is_needed(models, folders, tmp_path, sharded):
    """Through huggingface_hub itself, from a hub on this machine."""
    folder = folders["Emu3"]
    if not sharded:
        folder = tmp_path / "whole"
        models["Emu3"].save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    Hub.root, Hub.asked = folder, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = "from anyglot_tokenizers.hf_image import Emu3Image; print(Emu3Image.fetch('owner/whole', None))"
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    environment |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
    finally:
        server.shutdown()
        (folder / "pytorch_model.bin").unlink()
    assert done.returncode == 0, done.stderr
    weights = {name for name in Hub.asked if name.endswith((".safetensors", ".bin"))}
    assert weights == (shards_of(folder)[0] if sharded else {"model.safetensors"})
    assert load(done.stdout.strip()).fingerprint == load(folders["Emu3"]).fingerprint
