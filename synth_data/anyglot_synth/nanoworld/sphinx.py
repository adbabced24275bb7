"""A second opinion on speech by a recogniser that never heard the voices of nanoworld: pocketsphinx.

https://github.com/cmusphinx/pocketsphinx, BSD, with the American English acoustic model its package carries and a
closed grammar of the world's descriptions and answers in place of a language model. It does not know questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from anyglot_synth.nanoworld.language import NUMBERS
from anyglot_synth.nanoworld.scene import COLORS, COLUMNS, ROWS, SHAPES, SIZES
from anyglot_synth.nanoworld.voices import SAMPLE_RATE, Float32, check_audio
from anyglot_tokenizers.errors import AnyglotError

if TYPE_CHECKING:
    from pocketsphinx import Decoder


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
        try:
            from pocketsphinx import Decoder, get_model_path
        except ImportError as error:
            raise AnyglotError("pocketsphinx is not installed; install it with: pip install pocketsphinx") from error
        self._decoder: Decoder = Decoder(
            hmm=get_model_path("en-us/en-us"),
            dict=get_model_path("en-us/cmudict-en-us.dict"),
            lm=None,
            samprate=SAMPLE_RATE,
            loglevel="FATAL",
        )
        self._decoder.add_jsgf_string("nanoworld", sphinx_grammar())
        self._decoder.activate_search("nanoworld")

    def transcribe(self, audios: Sequence[Float32]) -> list[str]:
        """Transcribe waveforms [samples] at 16 kHz; an empty string where no sentence of the grammar fits.

        Raises:
            MediaError: an array is not mono, not finite, or too long.
        """
        return [self._transcribe(check_audio(audio, number)) for number, audio in enumerate(audios)]

    def _transcribe(self, audio: Float32) -> str:
        if float(np.abs(audio).max()) < 1e-4:
            return ""
        silence = np.zeros(SAMPLE_RATE // 4, np.float32)
        padded = np.concatenate([silence, audio * (0.5 / np.abs(audio).max()), silence])
        self._decoder.start_utt()
        self._decoder.process_raw(np.round(padded * 32767).astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return "" if hypothesis is None else str(hypothesis.hypstr)
