"""Fixtures for all tests: real data where it is there, and torch settings that make results repeatable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

# Derandomised: the same examples on every run and machine. Slow machines must not fail on time.
settings.register_profile(
    "house", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50
)
settings.load_profile("house")


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in {"", "0", "false"}


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The folder that holds pyproject.toml."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real media, never copied into the project: $ANYGLOT_DATA, or `shared/data` beside or in the repository.

    Tests that need it are skipped where it is missing, except in CI, where missing data must not pass unseen.
    """
    named = os.environ.get("ANYGLOT_DATA")
    candidates = [Path(named)] if named else [ROOT.parent / "shared" / "data", ROOT / "shared" / "data"]
    for folder in candidates:
        if folder.is_dir():
            return folder
    places = " or ".join(map(str, candidates))
    reason = f"no real data at {places}; set ANYGLOT_DATA to the folder that holds real/"
    if _in_ci():
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def _repeatable_torch() -> Iterator[None]:
    """One thread and a fixed seed for each test, whatever ran before it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
