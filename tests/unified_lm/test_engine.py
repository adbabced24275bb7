from __future__ import annotations

import copy
import functools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from anyglot_lm.constrain import FREE, Answer, Legal, Masks
from anyglot_lm.engine import (
    GREEDY,
    GenerationError,
    Guidance,
    Sampling,
    generate,
    penalise,
    row_seeds,
    sample,
)
from anyglot_lm.grammar import Request, SpanGrammar
from anyglot_lm.sampling import guided, level_text
from anyglot_lm.vocabulary import BlockSpec, Vocabulary

VOCABULARY = Vocabulary.build(
    60,
    BlockSpec("image", "i", 16, 2, "raster", grid=(2, 3)),
    BlockSpec("speech", "s", 16, 3, "delay", "first", max_frames=6),
    BlockSpec("music", "m", 16, 2, "frame_major", max_frames=9),
)
EOS = VOCABULARY.controls["eos"]


@functools.cache
def tiny_llama(attention: str = "sdpa", kv_heads: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY.size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        initializer_range=0.3,
        attn_implementation=attention,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[61, 63, *rng.integers(0, 60, rng.integers(0, 12)).tolist(), 64] for _ in range(count)]


REQUESTS = [
    Request(order=("image",), max_ids=40),
    Request(order=("text", "speech"), max_ids=60, max_length={"text": 9}),
    Request(order=("speech", "music"), max_ids=60, min_frames={"music": 2}),
    Request(max_ids=40),
    Request(required={"image", "text"}, max_ids=50),
    Request(forbidden={"text"}, max_ids=45),
    Request(order=("text",), max_ids=20),
    Request(max_ids=60, max_length={"text": 1}),
]


@torch.no_grad()
def reference(prompt: list[int], request: Request) -> list[int]:
    """Greedy decoding in the plainest way: the whole sequence for each id, full head, full mask."""
    grammar, model = SpanGrammar(VOCABULARY), tiny_llama()
    user = VOCABULARY.controls["user"]
    state, ids = grammar.start(request), []
    while not grammar.finished(state):
        logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, -1]
        goes_on = state.position >= 0 and grammar.allowed(state)[0][0] < VOCABULARY.text_size
        if not goes_on:
            logits[EOS] = (logits[EOS].exp() + logits[user].exp()).log()  # either ends the turn
        mask = torch.full_like(logits, -torch.inf)
        for low, high in grammar.allowed(state):
            mask[low:high] = 0
        if state.modality == "text" and goes_on and (mask[EOS:] == 0).any():  # what ends a text ends it all
            ends = torch.arange(len(mask)).ge(EOS) & torch.arange(len(mask)).lt(VOCABULARY.open_size)
            before, legal = logits[ends].exp().sum(), ends & (mask == 0)
            logits[legal] += (before / logits[legal].exp().sum()).log()
        chances = (logits + mask).softmax(-1)
        text = chances[: VOCABULARY.text_size]
        if state.position < 0:  # text is one choice among media and eos, then its first id another
            more = text.sum() > chances[VOCABULARY.text_size :].max()
            chances[VOCABULARY.text_size :] *= not more
            chances[: VOCABULARY.text_size] *= more
        ids.append(int(chances.argmax()))
        state = grammar.advance(state, ids[-1])
    return ids


@pytest.mark.parametrize("follows", ["eos", "user", "assistant", "image"])
def test_a_text_ends_where_the_model_would_end_it_however(follows: str) -> None:
    """The request wants speech after the text; the model would rather stop, or draw."""
    model = copy.deepcopy(tiny_llama())
    controls, blocks = VOCABULARY.controls, {block.modality: block.start_id for block in VOCABULARY.blocks}
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    hidden_TH = model.model(torch.tensor([[*prompts(1)[0], 3]])).last_hidden_state[0]
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        rows[3] = 9 * hidden_TH[-2]
        rows[{**controls, **blocks}[follows]] = 9 * hidden_TH[-1]
        rows[5] = 5 * hidden_TH[-1]  # what a text goes on with
    request = Request(order=("text", "speech"), max_ids=60)
    ((first, second, *_),) = generate(model, VOCABULARY, prompts(1), request, {"text": GREEDY})
    assert (first, second) == (3, blocks["speech"])
    grammar = SpanGrammar(VOCABULARY)
    legal = Legal(grammar.allowed(grammar.advance(grammar.start(request), 3)), True)
    logits = model(torch.tensor([[*prompts(1)[0], 3]])).logits[:, -1].detach()
    both = Masks(VOCABULARY).fill_([legal, FREE], logits.repeat(2, 1))
    assert both[0].argmax() == blocks["speech"] and torch.equal(both[1], logits[0])


def test_a_full_text_ends_the_turn_where_the_user_would_go_on() -> None:
    """No more text is legal; the user's turn is the likeliest, then a picture, then eos."""
    model = copy.deepcopy(tiny_llama())
    image = VOCABULARY.block("image").start_id
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    hidden_TH = model.model(torch.tensor([[*prompts(1)[0], 3]])).last_hidden_state[0]
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        rows[3] = 9 * hidden_TH[-2]
        for token, times in ((VOCABULARY.controls["user"], 9), (image, 5), (EOS, 1)):
            rows[token] = times * hidden_TH[-1]
    request = Request(max_ids=60, max_length={"text": 1})
    assert generate(model, VOCABULARY, prompts(1), request, {"text": GREEDY}) == [[3, EOS]]
    answer = Answer(SpanGrammar(VOCABULARY), request)
    answer.feed([3])
    logits = model(torch.tensor([[*prompts(1)[0], 3]])).logits[:, -1].detach()
    assert Masks(VOCABULARY).fill_([answer.legal()], logits).argmax() == EOS


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_text_is_one_choice_whatever_its_first_word(temperature: float) -> None:
    """Text has 0.6 of the chances over six words, one medium 0.3, eos the rest."""
    chances = torch.tensor([[*[0.1] * 6, 0.3, 0.1]])
    logits = chances.log()
    level_text(logits, slice(0, 6), temperature)
    if temperature == 0:
        assert logits.argmax() < 6
        return
    shares = (logits / temperature).softmax(-1)[0]
    wanted = torch.tensor([0.6, 0.3, 0.1]) ** (1 / temperature)
    found = torch.stack([shares[:6].sum(), shares[6], shares[7]])
    torch.testing.assert_close(found, wanted / wanted.sum())
    assert torch.allclose(shares[:6], shares[0])


def test_greedy_begins_with_text_where_that_is_likelier_than_a_medium() -> None:
    model = copy.deepcopy(tiny_llama())
    with torch.no_grad():
        hidden_H = model.model(torch.tensor(prompts(1))).last_hidden_state[0, -1]
        weight, unit = model.get_output_embeddings().weight, hidden_H / hidden_H.square().sum()
        weight[: VOCABULARY.size] = -9 * unit
        weight[:5] = 1.0 * unit  # five words share what is more than speech has
        weight[VOCABULARY.block("speech").start_id] = 2.0 * unit
    greedy = {name: GREEDY for name in ("text", *VOCABULARY.modalities)}
    ((first, *_),) = generate(model, VOCABULARY, prompts(1), Request(max_ids=40), greedy)
    assert first < 5


@pytest.mark.parametrize("order", [("text",), None])
def test_a_turn_ends_where_the_user_would_go_on(order: tuple[str, ...] | None) -> None:
    """In a conversation of the training only the last answer is followed by eos, all others by the user's marker."""
    grammar, model = SpanGrammar(VOCABULARY), copy.deepcopy(tiny_llama())
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    hidden_TH = model.model(torch.tensor([[*prompts(1)[0], 3]])).last_hidden_state[0]
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCABULARY.controls["user"]] = 9 * hidden_TH[-1]
        model.get_output_embeddings().weight[3] = 9 * hidden_TH[-2]
    request = Request(order=order, max_ids=20)
    greedy = {name: GREEDY for name in ("text", *VOCABULARY.modalities)}
    written = generate(model, VOCABULARY, prompts(1), request, greedy)
    assert written == [[3, VOCABULARY.controls["eos"]]]
    logits = model(torch.tensor([[*prompts(1)[0], 3]])).logits[:, -1].detach()
    masked = Masks(VOCABULARY).fill_([Legal(grammar.allowed(grammar.advance(grammar.start(request), 3)), True)], logits)
    assert masked.argmax() == VOCABULARY.controls["eos"]


def test_greedy_equals_the_plain_way() -> None:
    rows = prompts(len(REQUESTS))
    settings = {name: GREEDY for name in ("text", *VOCABULARY.modalities)}
    found = generate(tiny_llama(), VOCABULARY, rows, REQUESTS, settings)
    assert found == [reference(row, request) for row, request in zip(rows, REQUESTS, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_alone_equals_in_batch(temperature: float) -> None:
    rows = prompts(28)
    requests = [REQUESTS[i % len(REQUESTS)] for i in range(len(rows))]
    settings = {name: Sampling(temperature, top_p=0.95) for name in ("text", *VOCABULARY.modalities)}
    together = generate(tiny_llama(), VOCABULARY, rows, requests, settings, seed=5)
    small = generate(tiny_llama(), VOCABULARY, rows, requests, settings, seed=5, batch_size=5)
    assert together == small
    seeds = row_seeds(5, len(rows))
    for i in range(len(rows)):
        assert generate(tiny_llama(), VOCABULARY, [rows[i]], requests[i], settings, seed=[seeds[i]])[0] == together[i]


@pytest.mark.parametrize(("attention", "kv_heads"), [("eager", 2), ("sdpa", 1)])
def test_other_attention(attention: str, kv_heads: int) -> None:
    model = tiny_llama(attention, kv_heads)
    rows = prompts(8)
    together = generate(model, VOCABULARY, rows, REQUESTS[1], seed=3)
    assert [
        generate(model, VOCABULARY, [row], REQUESTS[1], seed=[s])[0]
        for row, s in zip(rows, row_seeds(3, 8), strict=True)
    ] == together


def test_seed_decides_the_answer() -> None:
    rows = prompts(6)
    first = generate(tiny_llama(), VOCABULARY, rows, REQUESTS[3], seed=1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert generate(tiny_llama(), VOCABULARY, rows, REQUESTS[3], seed=1) == first
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert generate(tiny_llama(), VOCABULARY, rows, REQUESTS[3], seed=2) != first


def test_prefill_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = prompts(9)
    whole = generate(tiny_llama(), VOCABULARY, rows, REQUESTS[0])
    monkeypatch.setattr("anyglot_lm.engine.PREFILL_IDS", 5)
    assert generate(tiny_llama(), VOCABULARY, rows, REQUESTS[0]) == whole


def test_whatever_a_hot_model_says_parses() -> None:
    """Thousands of answers of a random model at temperature 2, under random requests."""
    grammar = SpanGrammar(VOCABULARY)
    rng = np.random.default_rng(3)
    names = ("text", *VOCABULARY.modalities)
    requests = []
    for _ in range(2000):
        if rng.random() < 0.5:
            order = [str(name) for name in rng.choice(names, rng.integers(1, 4))]
            order = [b for a, b in zip([None, *order], order, strict=False) if not (a == b == "text")]
            request = Request(order=tuple(order), max_ids=10**6, max_length={"text": 8})
        else:
            required = {str(name) for name in rng.choice(names, rng.integers(0, 3))}
            request = Request(required=required, max_ids=10**6, min_text=int(rng.integers(1, 3)))
        budget = grammar.shortest(request) + int(rng.integers(0, 20))
        requests.append(Request(**{**request.__dict__, "max_ids": budget}))
    settings = {name: Sampling(temperature=2.0) for name in names}
    answers = generate(tiny_llama(), VOCABULARY, prompts(2000), requests, settings, seed=7, batch_size=400)
    said: Counter[str] = Counter()
    for ids, request in zip(answers, requests, strict=True):
        assert len(ids) <= request.max_ids and ids[-1] == EOS
        spans = [span.modality for span in grammar.parse(ids)]
        said.update(spans)
        assert tuple(spans) == request.order if request.order else set(request.required) <= set(spans)
    assert min(said[name] for name in names) > 200


def test_on_row_gives_each_answer_once() -> None:
    seen: dict[int, list[int]] = {}
    found = generate(tiny_llama(), VOCABULARY, prompts(12), REQUESTS[3], on_row=seen.__setitem__, batch_size=5)
    assert [seen[i] for i in range(12)] == found


def test_bfloat16() -> None:
    model = LlamaForCausalLM(tiny_llama().config).to(torch.bfloat16)
    grammar = SpanGrammar(VOCABULARY)
    for ids in generate(model, VOCABULARY, prompts(6), REQUESTS[1]):
        assert [span.modality for span in grammar.parse(ids)] == ["text", "speech"]


def test_guidance_of_scale_one_and_equal_prompts_changes_nothing() -> None:
    rows = prompts(8)
    plain = generate(tiny_llama(), VOCABULARY, rows, REQUESTS[0], seed=2)
    other = prompts(8, seed=9)
    assert generate(tiny_llama(), VOCABULARY, rows, REQUESTS[0], seed=2, guidance=Guidance(other, {})) == plain
    greedy = generate(tiny_llama(), VOCABULARY, rows, REQUESTS[0], {"image": GREEDY})
    same = generate(
        tiny_llama(), VOCABULARY, rows, REQUESTS[0], {"image": GREEDY}, guidance=Guidance(rows, {"image": 5.0})
    )
    assert same == greedy
    assert (
        generate(tiny_llama(), VOCABULARY, rows, REQUESTS[0], seed=2, guidance=Guidance(other, {"image": 5.0})) != plain
    )
    # scale 0 is the unconditional model: that of the other prompts
    zero = generate(tiny_llama(), VOCABULARY, rows, REQUESTS[0], seed=2, guidance=Guidance(other, {"image": 0.0}))
    assert zero == generate(tiny_llama(), VOCABULARY, other, REQUESTS[0], seed=2)


def test_guidance_never_makes_an_unlikely_id_the_likeliest() -> None:
    conditional = torch.tensor([[0.6, 0.3, 0.0999, 0.0001]]).log()
    unconditional = torch.tensor([[0.6, 0.2, 0.199999, 0.000001]]).log()
    found = guided(conditional, unconditional, 4.0)
    assert (unconditional + 4 * (conditional - unconditional)).argmax() == 3 and found.argmax() == 1
    assert found[0, 3] == -torch.inf and torch.isfinite(found[0, :3]).all()
    assert torch.isfinite(guided(conditional, unconditional, 0.5)).all()
    illegal = torch.tensor([[0.0, 0.0, 0.0, -torch.inf]])
    for scale in (0.0, 0.5, 3.0):
        found = guided(conditional + illegal, unconditional + illegal, scale)
        assert found[0, 3] == -torch.inf and torch.isfinite(found[0, 0])


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 30.0])
@pytest.mark.parametrize("request_", [Request(max_ids=30), Request(order=("text", "image"), max_ids=60)])
def test_text_can_be_guided_at_any_scale(request_: Request, scale: float) -> None:
    rows, guidance = prompts(8), Guidance(prompts(8, seed=9), {"text": scale, "image": scale})
    for settings in ({}, {"text": GREEDY, "image": GREEDY}):
        for ids in generate(tiny_llama(), VOCABULARY, rows, request_, settings, guidance=guidance):
            SpanGrammar(VOCABULARY).parse(ids)


def test_ends_that_others_forbid_stay_forbidden() -> None:
    legal = Legal(((0, VOCABULARY.text_size), (EOS, EOS + 1)), True)
    logits = torch.zeros(2, VOCABULARY.size)
    logits[:, EOS] = -torch.inf  # as min_new_tokens of transformers does
    found = Masks(VOCABULARY).fill_([legal, legal], logits)
    assert not found.isnan().any() and (found[:, EOS] == -torch.inf).all() and (found[:, 0] == 0).all()


def test_repetition_penalty_of_a_row_is_its_own() -> None:
    rows = prompts(8)
    settings = {"text": Sampling(0.0, repetition_penalty=1e4)}
    request = Request(order=("text",), max_ids=40, min_text=30)
    answers = generate(tiny_llama(), VOCABULARY, rows, request, settings)
    for ids, row in zip(answers, rows, strict=True):
        assert len(set(ids[:30])) == 30
        assert generate(tiny_llama(), VOCABULARY, [row], request, settings)[0] == ids


def test_sample_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).repeat(20000, 1)
    draws = torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, 20000) / 2**32)
    for settings, expected in [
        (Sampling(), logits[0].softmax(-1)),
        (Sampling(0.5), (logits[0] * 2).softmax(-1)),
        (Sampling(top_k=2), torch.tensor([0, 0.2689, 0, 0.7311])),
        (Sampling(top_p=0.6), torch.tensor([0.0, 0, 0, 1])),
        (Sampling(top_p=0.7), torch.tensor([0, 0.2689, 0, 0.7311])),
        (Sampling(min_p=0.3), torch.tensor([0, 0.2689, 0, 0.7311])),
        (Sampling(0.0), torch.tensor([0.0, 0, 0, 1])),
    ]:
        shares = torch.bincount(sample(logits, draws, settings), minlength=4) / 20000
        torch.testing.assert_close(shares, expected.float(), atol=0.015, rtol=0)


def test_sample_never_takes_an_illegal_id() -> None:
    logits = torch.tensor([[-torch.inf, 3.0, -torch.inf], [-torch.inf, -torch.inf, -80.0]])
    for draw in (0.0, 1 - 2**-32):
        assert sample(logits, torch.full((2,), draw, dtype=torch.float64), Sampling()).tolist() == [1, 2]


@pytest.mark.parametrize("settings", [Sampling(1e-50), Sampling(top_p=1e-50), Sampling(1e-6, top_p=1e-9, min_p=1.0)])
def test_extreme_settings_stay_in_the_slice(settings: Sampling) -> None:
    logits = torch.randn(50, 7)
    draws = torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, 50) / 2**32)
    assert torch.equal(sample(logits, draws, settings), logits.argmax(-1))
    nothing = sample(torch.full((50, 7), torch.nan), draws, Sampling())
    assert int(nothing.min()) >= 0 and int(nothing.max()) < 7


def test_penalise() -> None:
    found = penalise(torch.tensor([[2.0, -2.0, 2.0]]), torch.tensor([[True, True, False]]), 2.0)
    assert found.tolist() == [[1.0, -4.0, 2.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[]]}, "prompt 0 is empty"),
        ({"prompts": [[5000]]}, "ids outside 0..255"),
        (
            {"prompts": [[1] * 250]},
            "prompt 0 has 250 ids and the answer up to 15, but the model has 256 positions",
        ),
        ({"requests": []}, "requests has 0 entries for 1 prompts"),
        ({"seed": [1, 2]}, "seed has 2 entries"),
        ({"sampling": {"video": Sampling()}}, "unknown modality 'video'"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"prompts": [[1]], "requests": REQUESTS[0]}
    with pytest.raises(GenerationError, match=message):
        generate(tiny_llama(), VOCABULARY, **{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad",
    [
        *({"temperature": value} for value in (-1.0, math.inf, math.nan)),
        *({"repetition_penalty": value} for value in (0.0, math.inf)),
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"top_k": -1},
    ],
)
def test_bad_sampling(bad: dict[str, float]) -> None:
    with pytest.raises(GenerationError, match=next(iter(bad))):
        Sampling(**bad)  # type: ignore[arg-type]


def test_broken_model_is_an_error() -> None:
    model = LlamaForCausalLM(tiny_llama().config)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(GenerationError, match="image are not finite"):
        generate(model, VOCABULARY, [[1]], REQUESTS[0])


def test_vocabulary_of_another_model_is_an_error() -> None:
    large = Vocabulary.build(1000)
    with pytest.raises(GenerationError, match="256 rows in its LM head and the vocabulary"):
        generate(tiny_llama(), large, [[1]], Request())


def test_no_prompts() -> None:
    assert generate(tiny_llama(), VOCABULARY, [], []) == []


def test_any_whole_number_is_a_seed() -> None:
    assert row_seeds(-1, 2) == row_seeds(2**64 - 1, 2) != row_seeds(1, 2)
    plain, other = (generate(tiny_llama(), VOCABULARY, prompts(2), REQUESTS[0], seed=seed) for seed in (3, np.int64(3)))
    assert plain == other and generate(tiny_llama(), VOCABULARY, prompts(1), REQUESTS[0], seed=-1)
