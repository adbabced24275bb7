"""How a language model talked before: its own answers to ordinary questions, to be learnt along with new modalities.

Training on codes in another template makes a chat model forget how it answers. Replay of books keeps its English, not
its manner; what keeps that are its own greedy answers, asked in its own chat template and learnt in ours
(self-distillation: Yang et al. 2024, arXiv 2402.13669). `agreement` measures how much is left, on questions that no
training had. The questions are about everyday things and made from the lists below; nothing here trains.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch

from anyglot_lm.adapter import Backbone
from anyglot_lm.segments import Sample, Segment
from anyglot_lm.unified import UnifiedModel
from anyglot_tokenizers.errors import ManifestError

MOST = 80
"""Most ids of an answer. What breaks off is cut back to its last whole sentence."""
HELD_OUT = (
    "What is the capital of Norway?",
    "What is a library?",
    "Give me a tip for learning the guitar.",
    "Why do people like the sea?",
    "Hi! What can you do for me?",
)
"""Questions that are in no training."""
_THINGS = """the sun|the moon|a volcano|a rainbow|gravity|electricity|a magnet|oxygen|water|ice|a desert|a forest
a river|an island|the ocean floor|a whale|a bee|a spider|an elephant|a penguin|a dog|a cat|a horse|a butterfly
a dinosaur|bread|cheese|rice|chocolate|coffee|tea|honey|salt|an apple|a potato|soup|a bridge|a train|a bicycle
an airplane|a ship|a clock|a telescope|a microscope|a computer|the internet|a robot|a camera|a book|a newspaper
a museum|a school|a hospital|a garden|a violin|a drum|a piano|an orchestra|jazz|dance|football|swimming|a marathon
the Olympic Games|a democracy|a king|money|a bank|a dictionary|poetry|a fairy tale|a painting|photography|sleep
a dream|the heart|the brain|a muscle|a vitamin"""
_COUNTRIES = """France|Spain|Italy|Germany|Portugal|Greece|Turkey|Egypt|Kenya|Morocco|Nigeria|Ghana|India|China
Japan|Korea|Thailand|Vietnam|Indonesia|Australia|New Zealand|Canada|Mexico|Brazil|Argentina|Chile|Peru|Cuba|Sweden
Finland|Denmark|Poland|Austria|Hungary|Ireland|Iceland|Russia|Ukraine|Switzerland|Belgium"""
_DOINGS = """cooking|baking|running|swimming|reading|writing|painting|singing|dancing|gardening|fishing|hiking
camping|studying|drawing|sewing|cycling|skiing|sailing|traveling|meditating|saving money|making friends
speaking in public|learning a language|waking up early|keeping a diary|taking photos|playing chess|playing football
cleaning the kitchen|growing tomatoes|training a dog|preparing for an exam|packing a suitcase|giving a gift
telling a story|falling asleep"""
_ABOUT_THINGS = """What is {}?|Tell me something about {}.|Explain {} to a child.|Why is {} important?
How would you describe {}?|What is the history of {}?|Write a short poem about {}.|Tell me three facts about {}.
What would the world be without {}?"""
_ABOUT_COUNTRIES = """What is the capital of {}?|What can I see in {}?|Which languages do people speak in {}?
What do people eat in {}?|What is {} famous for?|When should I travel to {}?|Tell me about the history of {}."""
_ABOUT_DOINGS = """Give me a tip for {}.|How do I get better at {}?|What do I need for {}?|Why is {} good for me?
How do I start with {}?|What is hard about {}?|Write a short story about {}."""
_TALK = """Hello!|Hi, how are you?|Good morning.|What is your name?|Who are you?|Can you help me?|Thank you very much.
Tell me a joke.|I am bored. What should I do?|I am sad today.|What should I eat tonight?|What is a good name for a cat?
What should I do on a rainy day?|Can you speak English?|Do you like music?|What time is it?|Goodbye!|Tell me a fact.
How can I be happy?|Which book should I read?|What is two plus two?|What comes after Monday?
How many legs has a spider?"""


def questions() -> list[str]:
    """The questions of training, in one order."""
    lists = ((_THINGS, _ABOUT_THINGS), (_COUNTRIES, _ABOUT_COUNTRIES), (_DOINGS, _ABOUT_DOINGS))
    asked = [form.format(name) for names, forms in lists for form, name in product(_split(forms), _split(names))]
    return [question for question in (*asked, *_split(_TALK)) if question not in HELD_OUT]


def _split(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"[|\n]", text)]


class Original:
    """The language model as it was published, answering in its own chat template."""

    def __init__(self, backbone: Backbone) -> None:
        from transformers import AutoTokenizer

        from anyglot_lm.backbone import load_backbone

        where, gguf_file = backbone.place()
        options: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
        self.tokenizer = AutoTokenizer.from_pretrained(where, padding_side="left", **options)
        if not self.tokenizer.chat_template:
            raise ManifestError(f"{backbone.name} has no chat template, hence no answers of its own; set talk_share: 0")
        self.model = load_backbone(where, gguf_file=gguf_file)

    @torch.inference_mode()
    def answers(self, asked: Sequence[str], batch_size: int = 16) -> list[str]:
        """A greedy answer to each question, which may be empty."""
        found: list[str] = []
        for start in range(0, len(asked), batch_size):
            texts = [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
                )
                for question in asked[start : start + batch_size]
            ]
            given = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            ids = self.model.generate(**given, max_new_tokens=MOST, do_sample=False)[:, given["input_ids"].shape[1] :]
            found += [whole_sentences(text) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return found


def whole_sentences(text: str) -> str:
    """A text up to the end of its last whole sentence; all of it where there is none."""
    ends = list(re.finditer(r"[.!?][\"')]*(?=\s|$)", text.strip()))
    return text.strip()[: ends[-1].end()] if ends else text.strip()


def talk(question: str, answer: str) -> Sample:
    """The training sample."""
    return Sample([Segment("text", question, "user"), Segment("text", answer, "assistant")])


@torch.inference_mode()
def agreement(model: UnifiedModel, question: str, answer: str) -> float:
    """Share of the ids of a given answer that are the model's first choice after the ids before them, 0..1."""
    ids, loss = model.template.render(talk(question, answer), model.vocabulary, model.text)
    logits = model.model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0]
    own = logits[:, : model.vocabulary.text_size].argmax(-1).numpy()
    text = loss & (ids < model.vocabulary.text_size)
    return float((own[:-1] == ids[1:])[text[1:]].mean())
