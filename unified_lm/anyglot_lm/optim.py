"""MuonAdamW: Muon for the hidden matrices, AdamW for embeddings, norms and biases, as one torch optimizer.

Muon (K. Jordan, 2024; "Muon is scalable", arXiv 2502.16982) orthogonalises the momentum of each matrix with a few
Newton-Schulz steps; the update is scaled by 0.2 sqrt(max(rows, columns)) so that AdamW's learning rates and weight
decay carry over. One optimizer (not two) so that Lightning's automatic optimisation, clipping and checkpoints apply.

It does not schedule learning rates: a `LambdaLR` over it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(update_MN: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix of `update_MN`, approximately: quintic Newton-Schulz in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update_MN.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(update_MN.dtype)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """(hidden matrices, embedding and head matrices, vectors) of the trainable parameters of `model`."""
    matrices, tables, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif "embed" in name or "lm_head" in name:
            tables.append(parameter)
        else:
            matrices.append(parameter)
    return matrices, tables, vectors


class MuonAdamW(torch.optim.Optimizer):
    """See the module docstring.

    Args:
        model: its trainable parameters are split into hidden matrices (Muon) and the rest (AdamW).
        lr: learning rate of both parts.
        weight_decay: decoupled decay of the hidden matrices; embeddings and vectors are not decayed.
        muon: False puts every parameter under AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        muon: bool = True,
    ) -> None:
        matrices, tables, vectors = split_parameters(model)
        groups: list[dict[str, Any]] = [
            {"params": matrices, "muon": muon, "weight_decay": weight_decay},
            {"params": tables + vectors, "muon": False, "weight_decay": 0.0},
        ]
        defaults = {"lr": lr, "betas": betas, "momentum": momentum, "eps": 1e-8}
        super().__init__([g for g in groups if g["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self._muon(parameters, group)
            else:
                self._adamw(parameters, group)
        return loss

    def _muon(self, parameters: Iterable[nn.Parameter], group: dict[str, Any]) -> None:
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            update = orthogonalise(p.grad.lerp(state["momentum"], group["momentum"]))
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)

    def _adamw(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())
                state["mean"] = torch.zeros_like(p)
                state["square"] = torch.zeros_like(p)
            state["step"] += 1
            t = state["step"].item()
            state["mean"].lerp_(p.grad, 1 - beta1)
            state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            denominator = (state["square"] / (1 - beta2**t)).sqrt_().add_(group["eps"])
            p.addcdiv_(state["mean"], denominator, value=-group["lr"] / (1 - beta1**t))
