"""Anyglot synthetic data: make paired text, pictures, speech and music with known ground truth.

The one world shipped inside this package is :mod:`anyglot_synth.nanoworld`. This file holds no code besides
the version.
"""

__version__ = "0.1.0"
