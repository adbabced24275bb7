"""The meter's numbers against counting by hand, over ranks too; the warning comes when it should, and once."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import pytest
import torch

from anyglot_lm.meter import DivergenceWatch, Meter, matmul_rate

SLICES = {"text": (0, 10), "image": (10, 26)}


def meter(**settings: float) -> Meter:
    return Meter(SLICES, 26, pad_id=0, **settings)  # type: ignore[arg-type]


def test_speed_padding_and_mfu() -> None:
    one = meter(flops_per_id=100.0, rate=1e4)
    one.update(torch.tensor([[1, 2, 3, 0]]))
    one.update(torch.tensor([[5, 0, 0, 0]]))
    found = one.metrics(one.sums(), seconds=2.0)
    assert found == {"ids_per_s": 4.0, "useful_ids_per_s": 2.0, "padding": 0.5, "mfu": 100 * 4.0 / 1e4}
    both = {name: 2 * value for name, value in one.sums().items()}  # as two ranks add up
    found = one.metrics(both, seconds=2.0, ranks=2)
    assert found["ids_per_s"] == 8.0 and found["mfu"] == 0.04 and found["padding"] == 0.5
    plain = Meter(SLICES, 26, pad_id=None)
    plain.update(torch.zeros(1, 4, dtype=torch.long))
    assert plain.metrics(plain.sums(), 1.0) == {"ids_per_s": 4.0, "useful_ids_per_s": 4.0, "padding": 0.0}


def test_perplexity_is_the_number_of_codes_in_even_use() -> None:
    one = meter()
    labels = torch.tensor([10, 11, 12, 13, -100, -100, 3, 3])
    predicted = torch.tensor([10, 10, 11, 11, 25, 25, 4, 4])
    one.update(labels[None].clamp_min(0), labels, predicted)
    one.update(labels[None].clamp_min(0), labels, predicted)
    sums = one.sums()
    assert sums["target"].dtype == torch.int64 and sums["target"].sum() == 12  # nothing at ignored places
    assert sums["predicted"][25] == 0
    found = one.metrics(sums, 1.0)
    assert found["target_perplexity/image"] == pytest.approx(4)
    assert found["perplexity/image"] == pytest.approx(2)
    assert found["perplexity/text"] == pytest.approx(1)


def test_perplexity_of_ranks_is_of_their_sum_not_their_mean() -> None:
    ranks = [meter(), meter()]
    for rank, code in zip(ranks, (10, 20), strict=True):
        rank.update(torch.tensor([[code]]), torch.tensor([code]), torch.tensor([code]))
        assert rank.metrics(rank.sums(), 1.0)["perplexity/image"] == pytest.approx(1)
    sums = {name: ranks[0].sums()[name] + ranks[1].sums()[name] for name in ranks[0].sums()}
    assert ranks[0].metrics(sums, 1.0, ranks=2)["perplexity/image"] == pytest.approx(2)


def test_perplexity_of_uneven_use() -> None:
    one = meter()
    labels = torch.tensor([10] * 6 + [11] * 2)
    one.update(labels[None], labels)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    found = one.metrics(one.sums(), 1.0)
    assert found["target_perplexity/image"] == pytest.approx(math.exp(entropy))
    assert "perplexity/image" not in found and "target_perplexity/text" not in found


def test_output_norm_is_the_mean_length_of_hidden_states() -> None:
    one = meter()
    for length in (3.0, 5.0):
        one.update(torch.ones(1, 2, dtype=torch.long), hidden_BTD=torch.tensor([[[length, 0.0], [0.0, length]]]))
    assert one.metrics(one.sums(), 1.0)["output_norm"] == pytest.approx(4.0)


def test_reset_starts_a_new_window() -> None:
    one = meter()
    one.update(torch.ones(1, 4, dtype=torch.long))
    time.sleep(0.02)
    before = one.seconds()
    one.reset()
    assert before >= 0.02 and one.seconds() < before and one.sums() == {} and one.metrics({}, 1.0) == {}


def test_matmul_rate_is_measured_once_and_quickly() -> None:
    matmul_rate.cache_clear()
    state = torch.get_rng_state()
    start = time.perf_counter()
    rate = matmul_rate("cpu", torch.float32)
    first = time.perf_counter() - start
    assert 1e8 < rate < 1e15 and first < 5  # well under a second on a quiet machine
    assert torch.equal(torch.get_rng_state(), state)  # measuring changes no training
    assert matmul_rate("cpu", torch.float32) == rate and matmul_rate.cache_info().misses == 1


def test_matmul_rate_is_what_a_matmul_reaches() -> None:
    matmul_rate.cache_clear()
    rate = matmul_rate("cpu", torch.float32)
    a = torch.randn(512, 512)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    assert rate / 5 < 2 * 512**3 / min(seconds) < rate * 5  # other work runs beside the tests


def quiet_log(watch: DivergenceWatch, steps: int = 10) -> None:
    for step in range(steps):
        assert watch.check(step, {"loss": 2.0 + 0.1 * (step % 3), "grad_norm": 1.0, "output_norm": 10.0}) is None


def test_warning_names_value_median_and_way_out() -> None:
    watch = DivergenceWatch()
    quiet_log(watch)
    line = watch.check(10, {"loss": 2.0, "grad_norm": 8.0, "output_norm": 10.0})
    assert line is not None and "\n" not in line
    assert "step 10" in line and "grad_norm 8 (8.0 times its median 1)" in line and "lower lr" in line
    assert "loss" not in line.split(":")[1] and "output_norm" not in line


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm", "output_norm"])
def test_warning_of_values_that_are_not_finite(name: str, value: float) -> None:
    assert f"{name} {value}" in str(DivergenceWatch().check(0, {name: value}))


def test_one_warning_in_a_while() -> None:
    watch = DivergenceWatch(quiet=5, windows=50)
    quiet_log(watch, steps=30)
    said = [watch.check(step, {"grad_norm": 50.0}) is not None for step in range(12)]
    assert said == [True, False, False, False, False, False, True, False, False, False, False, False]


def test_a_new_level_becomes_usual() -> None:
    watch = DivergenceWatch(windows=6, quiet=1)
    quiet_log(watch)
    said = [watch.check(step, {"grad_norm": 9.0}) is not None for step in range(20)]
    assert said[0] and not any(said[6:])


def test_no_warning_of_slow_growth_or_before_there_is_a_usual_value() -> None:
    watch = DivergenceWatch()
    assert all(watch.check(step, {"loss": 0.1 * 10**step}) is None for step in range(5))
    watch = DivergenceWatch(windows=10)
    assert all(watch.check(step, {"output_norm": 1.05**step}) is None for step in range(200))


def test_meter_loads_no_lightning() -> None:
    code = (
        "import sys, anyglot_lm.meter; print(sorted({'lightning', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
