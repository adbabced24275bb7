"""Nanoworld: a small synthetic world whose every sample can be graded exactly.

A scene is one to three coloured shapes on a 3 x 3 grid. It can be said, spoken, drawn and played, and each of
these can be read back by a program (``language.parse``, ``judge``, ``see.see``, ``listen.listen``), so a
model that turns any of them into any other is graded attribute by attribute with ``scene.score``. Some
combinations of shape, color and size are held out of training (``scene.HELD_OUT``).

Pictures and melodies carry the same information by this rule:

=========  ==================================================  ==========================================
picture    values                                              melody
=========  ==================================================  ==========================================
shape      circle, square, triangle, cross                     instrument: flute, clarinet, strings, bell
size       small, large                                        tempo: fast (0.2 s a note), slow (0.3 s)
color      red, green, blue, yellow, purple, white             four-note scale (table in ``melody.py``)
row        top, middle, bottom                                 register: high, middle, low octave
column     left, center, right                                 contour: falling, arch, rising
things     1, 2, 3, in reading order                           phrases of 12, 6, 4 notes (12 in all)
=========  ==================================================  ==========================================

This file imports only the light parts (scenes and language); drawing, playing and recognising live in the
submodules.
"""

from anyglot_synth.nanoworld.language import (
    answer,
    apply_edit,
    describe,
    edit,
    parse,
    question,
    same_answer,
    spoken_clauses,
)
from anyglot_synth.nanoworld.scene import HELD_OUT, Scene, Thing, sample_scene, score

__all__ = [
    "HELD_OUT",
    "Scene",
    "Thing",
    "answer",
    "apply_edit",
    "describe",
    "edit",
    "parse",
    "question",
    "same_answer",
    "sample_scene",
    "score",
    "spoken_clauses",
]
