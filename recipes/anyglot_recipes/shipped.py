"""Where the weights that come with the package lie. Nothing is loaded here."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
NANO = WEIGHTS / "nano"
"""The model that is used where none is named; its tokenizers lie in its folder `tokenizers`."""
