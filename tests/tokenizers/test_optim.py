"""MuonAdamW: orthogonal updates for matrices, torch's AdamW for the rest, and a state that survives a restart."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from anyglot_tokenizers.optim import SMALLEST, MuonAdamW, is_hidden_matrix, orthogonalise


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(19, 16)
        self.wide = nn.Linear(16, 32)
        self.tall = nn.Linear(32, 16, bias=False)
        self.lm_head = nn.Linear(16, 19, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.tall(self.wide(self.embed_tokens(ids)).relu()))
        return out


def train(net: Net, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(0, 19, (8, 2), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(ids[:, 0]), ids[:, 1]).backward()
        optimizer.step()


def split(net: Net) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(hidden matrices, the rest)."""
    named = list(net.named_parameters())
    return [p for n, p in named if is_hidden_matrix(n, p)], [p for n, p in named if not is_hidden_matrix(n, p)]


def test_hidden_matrices() -> None:
    net = Net()
    assert [id(p) for p in split(net)[0]] == [id(net.wide.weight), id(net.tall.weight)]
    assert is_hidden_matrix("conv.weight", nn.Parameter(torch.zeros(SMALLEST, SMALLEST, 3, 3)))
    assert not is_hidden_matrix("depthwise.weight", nn.Parameter(torch.zeros(64, 1, 7)))
    assert not is_hidden_matrix("out.weight", nn.Parameter(torch.zeros(SMALLEST - 1, 64)))
    net.wide.weight.requires_grad_(False)
    assert len(MuonAdamW(net, lr=1.0).param_groups[0]["params"]) == 1


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96)])
def test_updates_are_orthogonal(shape: tuple[int, int], native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, product = set(), torch.baddbmm
    monkeypatch.setattr("anyglot_tokenizers.optim.native_bf16", lambda device: native)
    monkeypatch.setattr(torch, "baddbmm", lambda x, *args, **kwargs: seen.add(x.dtype) or product(x, *args, **kwargs))
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    spectrum = torch.linspace(0.05, 1, min(shape))  # a random square matrix would have directions of almost zero
    update = orthogonalise((left * (spectrum * 1e-3) @ right)[None])[0]
    singular = torch.linalg.svdvals(update)
    assert update.shape == shape and update.dtype == torch.float32
    assert singular.min() > 0.6 and singular.max() < 1.3
    assert seen == {torch.bfloat16 if native else torch.float32}  # emulated, it is many times slower


def test_a_step_moves_a_matrix_by_an_orthogonal_update() -> None:
    net = Net()
    before = net.tall.weight.detach().clone()
    train(net, MuonAdamW(net, lr=0.1, weight_decay=0.0), 1)
    step = (before - net.tall.weight.detach()) / (0.1 * 0.2 * 32**0.5)
    # The gradient of 8 samples has a low rank: the directions it has are scaled to about 1, the rest stay 0.
    singular = torch.linalg.svdvals(step)
    assert 0.6 < singular[0] < 1.3 and singular[-1] < 1.3


@pytest.mark.parametrize("native", [True, False])
def test_batches_of_matrices_move_as_each_alone(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices and kernels of one shape are one batch; large ones are cut into several."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(32, 16), (16, 32), (32, 16), (16, 16, 2), (32, 16), (16, 32)]
    sizes: list[int] = []
    monkeypatch.setattr("anyglot_tokenizers.optim.native_bf16", lambda device: native)
    monkeypatch.setattr("anyglot_tokenizers.optim.orthogonalise", lambda x: sizes.append(len(x)) or orthogonalise(x))

    def moved(batch: int, together: bool) -> list[Tensor]:
        monkeypatch.setattr("anyglot_tokenizers.optim.BATCH", batch)
        generator.manual_seed(0)
        made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        groups = [made] if together else [[parameter] for parameter in made]
        optimizers = [MuonAdamW([{"params": group, "muon": True}], lr=0.1) for group in groups]
        for _ in range(3):
            for parameter in made[1:]:  # the first has none
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            for optimizer in optimizers:
                optimizer.step()
        return [parameter.detach() for parameter in made]

    alone = moved(1, together=False)
    for batch, expected in ((1, [1] * 5), (1024, [2, 1, 2]), (1 << 24, [3, 2])):
        sizes.clear()
        for mine, theirs in zip(moved(batch, together=True), alone, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-2 if native else 1e-4)
        assert sizes == expected * 3


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_rest_is_torchs_adamw(weight_decay: float) -> None:
    net = Net()
    twin = copy.deepcopy(net)
    ours = MuonAdamW(net, lr=1e-2, weight_decay=weight_decay, muon=False)
    matrices, others = split(twin)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    train(net, ours, 10)
    train(twin, theirs, 10)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("muon", [True, False])
def test_embeddings_and_vectors_are_not_decayed(muon: bool) -> None:
    net = Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = MuonAdamW(net, lr=0.1, weight_decay=0.5, muon=muon)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in net.named_parameters():
        factor = 0.95 if name in ("wide.weight", "tall.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


@pytest.mark.parametrize("muon", [True, False])
def test_a_restored_state_goes_on_identically(muon: bool) -> None:
    net = Net()
    optimizer = MuonAdamW(net, lr=1e-2, muon=muon)
    train(net, optimizer, 3)
    twin = copy.deepcopy(net)
    restored = MuonAdamW(twin, lr=1e-2, muon=muon)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, 3, seed=1)
    train(twin, restored, 3, seed=1)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_closure_gives_the_loss() -> None:
    net = Net()
    optimizer = MuonAdamW(net, lr=1e-2)

    def closure() -> float:
        optimizer.zero_grad()
        loss: Tensor = net(torch.tensor([1, 2])).square().mean()
        loss.backward()
        return loss.item()

    first = optimizer.step(closure)
    second = optimizer.step(closure)
    assert first is not None and second is not None and second < first


def test_convolutions_are_matrices_of_outputs_by_the_rest() -> None:
    layer = nn.Conv2d(16, 24, 3)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn_like(layer.weight)
    MuonAdamW(layer, lr=0.1, weight_decay=0.0).step()
    step = (before - layer.weight.detach()).flatten(1) / (0.1 * 0.2 * 144**0.5)
    singular = torch.linalg.svdvals(step)
    assert step.shape == (24, 144) and singular.min() > 0.6 and singular.max() < 1.3
