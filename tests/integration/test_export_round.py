"""The shipped model, exported, in plain transformers: what goes in and what comes out is as with ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from anyglot_lm.engine import GREEDY
from anyglot_lm.export import export
from anyglot_lm.grammar import Request
from anyglot_lm.hf_processor import SpanLogitsProcessor
from anyglot_lm.processor import AnyglotProcessor
from anyglot_lm.unified import MAX_TEXT, UnifiedModel
from anyglot_recipes.shipped import NANO
from anyglot_synth.nanoworld.draw import draw
from anyglot_synth.nanoworld.language import parse
from anyglot_synth.nanoworld.scene import sample_scene


@pytest.mark.slow
def test_pictures_in_text_and_pictures_out(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(NANO, folder)
    ours = UnifiedModel.from_pretrained(NANO)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    processor = AnyglotProcessor.from_pretrained(folder)

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(draw(sample_scene(rng, "test"))) for _ in range(4)]
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)

    def answers(conversations: list[Any], request: Request) -> torch.Tensor:
        inputs = processor.apply_chat_template(conversations, add_generation_prompt=True)
        grammar = SpanLogitsProcessor(processor.vocabulary, request)
        ids: torch.Tensor = model.generate(
            **inputs, logits_processor=[grammar], max_new_tokens=grammar.max_new_tokens, do_sample=False
        )
        return ids

    shown = [[{"role": "user", "content": [{"type": "image", "image": picture}]}] for picture in pictures]
    ids = answers(shown, Request(order=("text",), max_length={"text": MAX_TEXT}))
    texts = processor.post_process_multimodal_output(ids, generation_mode="text")
    assert texts == [ours.generate("text", sampling=GREEDY, image=file).text for file in files]
    assert all(parse(text) is not None for text in texts), texts

    ids = answers([[{"role": "user", "content": text}] for text in texts], Request(order=("image", "speech")))
    for text, outputs in zip(texts, processor.parse(ids), strict=True):
        expected = ours.generate(("image", "speech"), sampling=GREEDY, text=text)
        for found, wanted in zip(outputs, expected, strict=True):
            assert found.modality == wanted.modality and found.media is not None and wanted.media is not None
            assert torch.equal(found.codes, wanted.codes)  # type: ignore[arg-type]
            torch.testing.assert_close(found.media, wanted.media, rtol=0, atol=1e-4)
    drawn = processor.post_process_multimodal_output(ids, generation_mode="image")
    assert [image.size for image in drawn] == [pictures[0].size] * 4
