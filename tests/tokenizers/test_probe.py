"""Linear probes: the optimum is the optimum, held-out groups are held out, features are what they say."""

import numpy as np
import pytest
import torch

from anyglot_tokenizers import AnyglotError
from anyglot_tokenizers.probe import (
    bag_of_codes,
    context_entries,
    fit_linear,
    label_information,
    linear_probe,
    mean_entries,
)


def test_bag_of_codes():
    codes = torch.tensor([[0, 0, 1, 2], [3, 3, 3, 3]])
    want = torch.tensor([0.5, 0.25, 0.25, 0, 0, 0, 0, 1]).sqrt()
    assert torch.allclose(bag_of_codes(codes, [4, 4]), want)
    halves = bag_of_codes(codes[:1], [3], parts=2)
    assert torch.allclose(halves, torch.tensor([1, 0, 0, 0, 0.5, 0.5]).sqrt())
    assert bag_of_codes(codes[:1, :1], [3], parts=3).square().sum() == 1, "parts without positions are zero"
    image = torch.arange(6).reshape(1, 2, 3)
    assert torch.allclose(bag_of_codes(image, [6]), torch.full((6,), 1 / 6).sqrt())


def test_entries():
    books = torch.arange(12.0).reshape(2, 3, 2)
    codes = torch.tensor([[0, 2], [1, 1]])
    assert mean_entries(codes, books).tolist() == [2, 3, 8, 9]
    assert mean_entries(codes[:1], books).tolist() == [2, 3]
    window = context_entries(codes[0], books[0], context=1)
    by_place = window.reshape(2, 2, 3).transpose(1, 2)  # position, place in the window, dim
    assert by_place[0].tolist() == [[0, 0], [0, 1], [4, 5]] and by_place[1].tolist() == [[0, 1], [4, 5], [0, 0]]


def test_label_information():
    codes = torch.arange(1000) % 8
    assert label_information(codes, codes // 2) == pytest.approx(1)
    assert label_information(codes, torch.arange(1000) // 8 % 5) == pytest.approx(0, abs=0.01)
    half = label_information(codes // 4, codes // 2)
    assert half == pytest.approx(0.5)
    with pytest.raises(AnyglotError, match="two classes"):
        label_information(codes, codes * 0)


def test_fit_linear_finds_the_optimum():
    """scipy, started elsewhere, finds the same minimum."""
    from scipy.optimize import minimize

    x, y = torch.randn(60, 4), torch.randint(3, (60,))
    weight, bias = fit_linear(x, y, 3, decay=0.01)

    def loss(flat):
        w, b = torch.from_numpy(flat[:12]).reshape(4, 3), torch.from_numpy(flat[12:])
        w.requires_grad_(), b.requires_grad_()
        value = torch.nn.functional.cross_entropy(x.double() @ w + b, y) + 0.005 * w.square().sum()
        value.backward()
        return value.item(), torch.cat([w.grad.flatten(), b.grad]).numpy()

    start = np.random.default_rng(0).normal(size=15)
    best = minimize(loss, start, jac=True, method="L-BFGS-B", options={"gtol": 1e-9})
    assert torch.allclose(weight.double(), torch.from_numpy(best.x[:12]).reshape(4, 3), atol=1e-3)
    assert best.fun == pytest.approx(loss(torch.cat([weight.flatten(), bias]).double().numpy())[0], abs=1e-6)


def items(groups=6, per_group=20, noise=0.3):
    """Features that say the class, in dims 0 to 2, and the group, in the rest."""
    labels = [f"class {index % 3}" for index in range(groups * per_group)]
    owners = [f"group {index // per_group}" for index in range(groups * per_group)]
    classes = torch.nn.functional.one_hot(torch.arange(groups * per_group) % 3, 3).float()
    voices = torch.nn.functional.one_hot(torch.arange(groups * per_group) // per_group, groups).float()
    return classes, voices, noise * torch.randn(groups * per_group, 3 + groups), labels, owners


def test_probe_reads_what_is_there():
    classes, voices, noise, labels, owners = items()
    found = linear_probe(torch.cat([classes, voices], 1) + noise, labels, owners)
    assert found["accuracy"] > 0.9 and found["low"] <= found["accuracy"] <= found["high"]
    assert (found["n"], found["classes"], found["groups"], found["folds"]) == (120, 3, 6, 5)
    assert found["chance"] == pytest.approx(1 / 3, abs=0.05)
    blind = linear_probe(noise, labels, owners)
    assert blind["low"] < 0.45 and blind["accuracy"] < found["low"]


def test_groups_are_held_out():
    """Features know the group only, and each group mostly says one class: without groups the probe would cheat."""
    _, voices, noise, _, owners = items(groups=5)
    labels = [f"class {int(owner[-1]) % 3}" for owner in owners]
    features = voices + noise[:, : voices.shape[1]]
    assert linear_probe(features, labels)["accuracy"] > 0.9
    assert linear_probe(features, labels, owners)["accuracy"] < 0.5


def test_probe_refuses():
    x = torch.randn(4, 2)
    with pytest.raises(AnyglotError, match="two classes"):
        linear_probe(x, ["a"] * 4)
    with pytest.raises(AnyglotError, match="two groups"):
        linear_probe(x, ["a", "b", "a", "b"], ["one"] * 4)
