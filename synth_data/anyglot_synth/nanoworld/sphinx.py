"""A second opinion on speech by a recogniser that never heard the voices of nanoworld: pocketsphinx.

https://github.com/cmusphinx/pocketsphinx, BSD, with the American English acoustic model its package carries and a
closed grammar of the world's descriptions and answers in place of a language model. It does not know questions. The
recogniser is that of `anyglot_synth.recognise`; this file holds the grammar.
"""

from __future__ import annotations

from collections.abc import Sequence

from anyglot_synth.nanoworld.language import NUMBERS
from anyglot_synth.nanoworld.scene import COLORS, COLUMNS, ROWS, SHAPES, SIZES
from anyglot_synth.nanoworld.voices import SAMPLE_RATE, Float32, check_audio
from anyglot_synth.recognise import SphinxRecogniser


def sphinx_grammar() -> str:
    """JSGF grammar of the spoken descriptions (one to three clauses) and of the answers."""

    def either(values: Sequence[str]) -> str:
        return " | ".join(values)

    return (
        "#JSGF V1.0;\ngrammar nanoworld;\n"
        f"<thing> = ({either(SIZES)}) ({either(COLORS)}) ({either(SHAPES)});\n"
        f"<place> = ({either(ROWS)}) ({either(COLUMNS)});\n"
        "<clause> = <thing> <place> | <place> <thing>;\n"
        f"<answer> = <thing> | <place> | {either((*SIZES, *COLORS, *SHAPES, *NUMBERS))};\n"
        "public <utterance> = <clause> [<clause> [<clause>]] | <answer>;\n"
    )


class SphinxJudge:
    """pocketsphinx with a closed grammar: slower and less exact than `SpeechJudge`, but it was made by others.

    It can only answer with sentences of the grammar, so read it as a check of meaning, not of single words.

    Raises:
        AnyglotError: pocketsphinx is not installed.
    """

    def __init__(self) -> None:
        self._recogniser = SphinxRecogniser(grammar=sphinx_grammar())
        self._recogniser.setup()

    def transcribe(self, audios: Sequence[Float32]) -> list[str]:
        """Transcribe waveforms [samples] at 16 kHz; an empty string where no sentence of the grammar fits.

        Raises:
            MediaError: an array is not mono, not finite, or too long.
        """
        checked = [check_audio(audio, number) for number, audio in enumerate(audios)]
        return self._recogniser.transcribe(checked, SAMPLE_RATE)
