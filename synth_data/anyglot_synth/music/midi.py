"""`MidiMusic`: MIDI files and notes played by the program fluidsynth with a sound font.

What is played: a file of a folder with captions (`path`), `style["midi"]` (a file) or `style["notes"]` (rows of start
and length in seconds, MIDI pitch, instrument), or a nanoworld description. fluidsynth (LGPL-2.1) is only ever run as
a program of its own; its sound depends on its version and the sound font, and both are in the identity.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyglot_synth.backends import Backend, BackendError, Made
from anyglot_synth.dialogue import MUSIC, Json
from anyglot_synth.folder import CaptionedFiles
from anyglot_synth.music.nanoworld import midi_bytes
from anyglot_synth.nanoworld.melody import Note, notes
from anyglot_synth.pictures.nanoworld import scene_of
from anyglot_synth.store import sha256_of

SOUND_FONTS = ("/usr/share/sounds/sf2", "/usr/share/soundfonts", "/usr/local/share/soundfonts")
"""Folders where systems keep sound fonts."""
_INSTALL = "install it (Debian/Ubuntu: apt-get install fluidsynth timgm6mb-soundfont, macOS: brew install fluid-synth)"


class MidiMusic(Backend):
    """See the module.

    Args:
        path: folder with captioned MIDI files, see `folder.py`; None plays nanoworld's descriptions.
        sound_font: an .sf2 file; None takes the first that the system has.
        sample_rate: of the sound, 8000 to 96000 Hz.
        gain: loudness, above 0 and up to 10.
        timeout_s: of one file.
        min_cover, choose: see `folder.CaptionedFiles`.
        licence: SPDX name for the music of files that do not say; sound fonts have their own.
    """

    modality = MUSIC
    name = "midi"

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        sound_font: str | os.PathLike[str] | None = None,
        sample_rate: int = 32_000,
        gain: float = 0.6,
        timeout_s: float = 120.0,
        min_cover: float = 0.5,
        choose: int = 1,
        licence: str = "unknown",
    ) -> None:
        if not 8_000 <= sample_rate <= 96_000 or not 0 < gain <= 10 or timeout_s <= 0:
            raise BackendError(
                f"midi: sample_rate {sample_rate}, gain {gain}, timeout_s {timeout_s}: use 8000 to 96000 Hz, a gain "
                f"up to "
                "10, a time above 0"
            )
        suffixes = (".mid", ".midi")
        self.files = None if path is None else CaptionedFiles(path, suffixes, min_cover, choose, licence)
        self.sound_font = None if sound_font is None else Path(sound_font)
        self.sample_rate, self.gain, self.timeout_s, self.licence = sample_rate, gain, timeout_s, licence
        self.seeded = self.files is not None and choose > 1
        self._identity: Json | None = None

    def identity(self) -> Json:
        """Version of fluidsynth, sha256 of the sound font, settings, and the folder's contents."""
        if self._identity is None:
            told = self._run(["--version"])
            version = re.search(r"version (\S+)", told)
            if version is None:
                raise BackendError(f"midi: fluidsynth does not say its version; {_INSTALL}")
            self._identity = {
                "engine": self.name,
                "fluidsynth": version.group(1),
                "sound_font": sha256_of(self._font()),
                "is": [self.sample_rate, self.gain],
                **({} if self.files is None else {"folder": self.files.identity()}),
            }
        return self._identity

    def setup(self) -> None:
        """Looks that program and sound font are here."""
        self.identity()

    def key(self, text: str, style: Mapping[str, Any], seed: int) -> str:
        """A file of the style counts by what is in it."""
        if "midi" in style:
            style = {**style, "midi": sha256_of(self._given(style))}
        return super().key(text, style, seed)

    def make(self, text: str, style: Mapping[str, Any], seed: int) -> Made:
        """Plays. Raises `Filtered` ("no_match") where no file of the folder fits."""
        found: Json = {}
        if "midi" in style:
            midi = self._given(style).read_bytes()
        elif "notes" in style:
            try:
                played = [Note(float(row[0]), float(row[1]), int(row[2]), str(row[3])) for row in style["notes"]]
                midi = midi_bytes(played)
            except (ValueError, TypeError, IndexError) as error:
                raise BackendError(f"midi: notes are rows of start, length, pitch, instrument ({error})") from None
        elif self.files is not None:
            file, found = self.files.find(text, seed)
            midi = file.path.read_bytes()
        else:
            midi = midi_bytes(notes(scene_of(text, style)))
        return self._play(midi, found)

    def _given(self, style: Mapping[str, Any]) -> Path:
        path = Path(str(style["midi"]))
        if not path.is_file():
            raise BackendError(f"{path}: there is no such MIDI file")
        return path

    def _font(self) -> Path:
        if self.sound_font is not None:
            if not self.sound_font.is_file():
                raise BackendError(f"{self.sound_font}: there is no such sound font; {_INSTALL}")
            return self.sound_font
        for folder in map(Path, SOUND_FONTS):
            if fonts := sorted(folder.glob("*.sf[23]")):
                return fonts[0]
        raise BackendError(f"midi: no sound font in {', '.join(SOUND_FONTS)}; {_INSTALL}, or give sound_font")

    def _play(self, midi: bytes, found: Json) -> Made:
        import soundfile

        if midi[:4] != b"MThd":
            raise BackendError("midi: not a MIDI file; use standard MIDI files (.mid)")
        with tempfile.TemporaryDirectory() as folder:
            file, sound = Path(folder) / "notes.mid", Path(folder) / "notes.wav"
            file.write_bytes(midi)
            settings = ["-n", "-i", "-q", "-r", str(self.sample_rate), "-g", str(self.gain), "-o", "synth.cpu-cores=1"]
            told = self._run([*settings, "-T", "wav", "-O", "s16", "-F", str(sound), str(self._font()), str(file)])
            try:
                audio, rate = soundfile.read(sound, dtype="float32", always_2d=True)
            except (soundfile.LibsndfileError, OSError) as error:
                raise BackendError(f"midi: fluidsynth made no sound ({told.strip()[-200:] or error})") from error
        if not len(audio):
            raise BackendError("midi: the file holds no notes")
        return Made(audio.mean(axis=1), rate, found, midi)

    def _run(self, arguments: list[str]) -> str:
        """What fluidsynth printed. Raises `BackendError`."""
        program = shutil.which("fluidsynth")
        if program is None:
            raise BackendError(f"midi: the program fluidsynth is not here; {_INSTALL}")
        try:
            done = subprocess.run(
                [program, *arguments],
                capture_output=True,
                timeout=self.timeout_s,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BackendError(f"midi: fluidsynth took more than {self.timeout_s:g} s", retryable=True) from None
        told = (done.stdout + done.stderr).decode("utf-8", "replace")
        if done.returncode:
            raise BackendError(f"midi: fluidsynth ended with {done.returncode}: {told.strip()[-200:]}")
        return told
