"""`PiperVoice`: neural voices of Piper (https://github.com/OHF-Voice/piper1-gpl) from a user's files.

Piper is GPL-3, so it only ever runs as a program of its own: `piper` on the PATH, or `python -m piper`. It loads its
voice for every text, which takes longer than to speak it; files of voices are not shipped and not downloaded.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from anyglot_synth.voices.base import Float32, SpeechBackend, positive, sha256_of_files
from anyglot_synth.voices.programs import ENGINE_TIMEOUT_S, SpeechError, run_program, speak_into_file


class PiperVoice(SpeechBackend):
    """One voice file of Piper, which may hold many speakers. Without noise, so that it repeats itself.

    Args:
        model: path of `NAME.onnx`, with `NAME.onnx.json` beside it.
        voices: of its speakers; of a file with one speaker the name of the file.
        licence: SPDX name of the voice's licence (each has its own, see its MODEL_CARD).
        command: program and first arguments; None takes `piper`.
        noise_scale: how much the timbre varies; 0 says the same text always alike.
        noise_w: how much the pace of sounds varies.
        timeout_s: of one text, start of the program included.

    Raises:
        SpeechError: the files are not there or are no voice.
    """

    name: ClassVar[str] = "piper"
    seeded = False
    max_characters = 500

    def __init__(
        self,
        model: str,
        voices: Sequence[str] | None = None,
        licence: str | None = None,
        command: Sequence[str] | None = None,
        noise_scale: float = 0.0,
        noise_w: float = 0.0,
        timeout_s: float = ENGINE_TIMEOUT_S,
    ) -> None:
        super().__init__(voices, licence)
        self.model, self.config_file = Path(model), Path(f"{model}.json")
        self.command = ["piper"] if command is None else list(command)
        self.noise = (float(noise_scale), float(noise_w))
        self.timeout_s = positive(timeout_s, "timeout_s")
        self.deterministic = self.noise == (0.0, 0.0)
        self._known: list[dict[str, Any]] | None = None
        self._speakers: dict[str, int] = {}
        self._identity: dict[str, Any] | None = None

    def identity(self) -> dict[str, Any]:
        """The program's version where it tells one, the voice's sha256, the noise."""
        if self._identity is None:
            self._identity = {
                "engine": self.name,
                "version": self._version(),
                "weights": sha256_of_files([self.model, self.config_file]),
                "noise": list(self.noise),
            }
        return self._identity

    def known_voices(self) -> list[dict[str, Any]]:
        """The speakers of the file."""
        if self._known is None:
            self._read_config()
        assert self._known is not None
        return self._known

    def setup(self) -> None:
        """Checks the files."""
        self.known_voices()
        self.identity()

    def _read_config(self) -> None:
        for path in (self.model, self.config_file):
            if not path.is_file():
                raise SpeechError(f"{path} is not there; a voice of piper is a file .onnx with its .onnx.json")
        try:
            config = json.loads(self.config_file.read_text(encoding="utf-8"))
            language = str(config.get("language", {}).get("code") or config["espeak"]["voice"]).replace("_", "-")
            speakers = {str(name): int(number) for name, number in config.get("speaker_id_map", {}).items()}
            if not speakers and int(config["num_speakers"]) > 1:
                speakers = {str(number): number for number in range(int(config["num_speakers"]))}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SpeechError(f"{self.config_file}: not the settings of a voice of piper ({error!r})") from None
        self._speakers = speakers
        self._known = [{"voice": name, "language": language} for name in speakers or [self.model.stem]]

    def _version(self) -> str:
        program = shutil.which(self.command[0])
        if program is None:
            raise SpeechError(
                f"the program {self.command[0]} is not here; install it (pip install piper-tts, GPL-3) or name it: "
                "command: [/path/to/python, -m, piper]"
            )
        if self.command[1:] == ["-m", "piper"]:
            ask = "import importlib.metadata as m; print(m.version('piper-tts'))"
            return run_program([program, "-c", ask], "telling the version of piper").strip()
        told = run_program([program, *self.command[1:], "--version"], "telling its version", good=(0, 1, 2))
        found = re.search(r"\d+\.\d[\w.]*", told)  # newer ones do not tell it
        return found.group() if found else "unknown"

    def _speak(self, text: str, voice: str, rate: float, pitch: float, seed: int) -> tuple[Float32, int]:
        self.find_voice(voice)
        # These spellings are understood by the first Piper and by its successor.
        options = {"model": self.model, "config": self.config_file, "length_scale": f"{1 / rate:.4f}"}
        options |= {"noise_scale": self.noise[0], "noise_w": self.noise[1]}
        if self._speakers:
            options["speaker"] = self._speakers[voice]

        def command(text_path: Path, wav_path: Path) -> list[str]:
            flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
            return [*self.command, *flags, "--output_file", str(wav_path)]

        doing = f"speaking {text[:60]!r} with voice {voice}"
        return speak_into_file(command, text, doing, stdin=text + "\n", timeout_s=self.timeout_s)
