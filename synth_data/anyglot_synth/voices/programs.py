"""Engines that are programs: finding them, asking for their version, having them speak a text into a file.

`flite` (https://github.com/festvox/flite, CMU licence) is a program on the PATH. `espeak-ng`
(https://github.com/espeak-ng/espeak-ng, GPL-3, only ever run as a program of its own) is one too, or the library
that the package `espeakng-loader` carries, run by `espeak_worker.py`. Every text is spoken by its own process, with the
text in a file and never on the command line, so a sound is a function of (engine, version, voice, parameters, text).

This file knows nothing of styles, loudness or caches.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from anyglot_synth.backends import BackendError
from anyglot_synth.scratch import scratch

ENGINE_TIMEOUT_S = 60.0
MAX_FILE_BYTES = 200_000_000


class SpeechError(BackendError):
    """An engine is missing, or could not speak a text."""


def missing(engine: str) -> SpeechError:
    """What to say where an engine is not here."""
    return SpeechError(
        f"the speech engine {engine} is not here; install flite (Debian/Ubuntu: apt-get install flite, "
        "macOS: brew install flite) or espeak-ng (apt-get install espeak-ng, or: pip install espeakng-loader)"
    )


def has_flite() -> bool:
    """Whether flite is on the PATH."""
    return shutil.which("flite") is not None


def has_espeak_library() -> bool:
    """Whether the package espeakng-loader is installed."""
    return importlib.util.find_spec("espeakng_loader") is not None


def has_espeak() -> bool:
    """Whether espeak-ng is here, as a program or a library."""
    return shutil.which("espeak-ng") is not None or has_espeak_library()


def run_program(
    command: Sequence[str],
    doing: str,
    *,
    good: tuple[int, ...] = (0,),
    stdin: str = "",
    timeout_s: float = ENGINE_TIMEOUT_S,
) -> str:
    """Runs an engine and returns what it printed.

    Args:
        command: program and arguments.
        doing: what for, for messages: "speaking ...".
        good: exit statuses that mean success.
        stdin: what the program reads there.
        timeout_s: after which it is killed.

    Raises:
        SpeechError: it is not there; or retryable: it ran out of time or was ended by a signal; or it failed.
    """
    try:
        done = subprocess.run(command, input=stdin.encode(), capture_output=True, timeout=timeout_s, check=False)
    except FileNotFoundError as error:
        raise missing(Path(command[0]).name) from error
    except subprocess.TimeoutExpired as error:
        raise SpeechError(f"{command[0]} did not finish within {timeout_s:g} s {doing}", retryable=True) from error
    except OSError as error:  # no memory or no process for it just now, or a file that cannot be executed
        raise SpeechError(f"{command[0]} cannot be run {doing}: {error.strerror}", retryable=True) from error
    if done.returncode < 0:
        raise SpeechError(f"{command[0]} was ended by signal {-done.returncode} {doing}", retryable=True)
    if done.returncode not in good:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["it printed nothing"]
        raise SpeechError(f"{command[0]} failed {doing} (status {done.returncode}): {lines[-1]}")
    return done.stdout.decode(errors="replace")


def espeak_library() -> list[str]:
    """The start of a command that runs `espeak_worker.py` on the library of `espeakng-loader`."""
    import espeakng_loader

    library, data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
    worker = Path(__file__).with_name("espeak_worker.py")
    return [sys.executable, "-I", "-S", str(worker), str(library), str(data)]


@cache
def engine_version(engine: str) -> str:
    """Version of an installed engine, e.g. `flite-2.2-current`; of espeak-ng that of the program, if there is one.

    Raises:
        SpeechError: it is not installed.
    """
    if engine == "flite" and has_flite():
        found = re.search(r"flite-\S+", run_program(["flite", "--version"], "telling its version", good=(0, 1)))
        return found.group() if found else "flite-unknown"
    if engine == "espeak-ng" and shutil.which("espeak-ng"):
        found = re.search(r"\d+\.\d[\w.-]*", run_program(["espeak-ng", "--version"], "telling its version"))
        return f"espeak-ng-{found.group()}" if found else "espeak-ng-unknown"
    if engine == "espeak-ng" and has_espeak_library():
        return espeak_library_version()
    raise missing(engine)


@cache
def espeak_library_version() -> str:
    """Version of the library, e.g. `espeak-ng-1.52.0`."""
    return f"espeak-ng-{run_program([*espeak_library(), '--version'], 'telling its version').strip()}"


def flite_command(voice: str, duration_stretch: str, text_path: Path, wav_path: Path) -> list[str]:
    """The command by which flite speaks a file. Raises `SpeechError` where it is not installed."""
    if not has_flite():
        raise missing("flite")
    stretch = f"duration_stretch={duration_stretch}"
    return ["flite", "-voice", voice, "--setf", stretch, "-f", str(text_path), "-o", str(wav_path)]


def espeak_command(
    voice: str, rate: str, pitch: str, text_path: Path, wav_path: Path, *, prefer_library: bool = False
) -> list[str]:
    """The command by which espeak-ng speaks a file. Raises `SpeechError` where it is not installed.

    Args:
        voice: e.g. "en-us+f2".
        rate: words a minute.
        pitch: 0 to 99, 50 is the voice's own.
        text_path: of the text, UTF-8.
        wav_path: what it writes.
        prefer_library: take the library where both are here.
    """
    library = has_espeak_library()
    if shutil.which("espeak-ng") and not (prefer_library and library):
        return ["espeak-ng", "-v", voice, "-s", rate, "-p", pitch, "-f", str(text_path), "-w", str(wav_path)]
    if library:
        return [*espeak_library(), voice, rate, pitch, str(text_path), str(wav_path)]
    raise missing("espeak-ng")


def speak_into_file(
    command: Callable[[Path, Path], Sequence[str]],
    text: str,
    doing: str,
    *,
    stdin: str = "",
    timeout_s: float = ENGINE_TIMEOUT_S,
) -> tuple[NDArray[np.float32], int]:
    """Has a program speak a text: (float32 `[samples]` of its first channel, sample rate).

    Args:
        command: `command(text_path, wav_path)` is run.
        text: goes into the text file, with a line end.
        doing: for messages.
        stdin: for programs that read the text there.
        timeout_s: after which the program is killed.

    Raises:
        SpeechError: see `run_program`; or it wrote nothing that is a sound.
    """
    try:
        with scratch() as folder:
            text_path, wav_path = Path(folder, "text.txt"), Path(folder, "speech.wav")
            text_path.write_text(text + "\n", encoding="utf-8")
            line = command(text_path, wav_path)
            run_program(line, doing, stdin=stdin, timeout_s=timeout_s)
            if not wav_path.is_file():
                raise SpeechError(f"{line[0]} wrote nothing {doing}; is the voice installed?")
            if wav_path.stat().st_size > MAX_FILE_BYTES:
                raise SpeechError(f"{line[0]} wrote {wav_path.stat().st_size} bytes {doing}: that is no utterance")
            audio, sample_rate = sf.read(wav_path, dtype="float32", always_2d=True)
    except sf.LibsndfileError as error:
        raise SpeechError(f"{line[0]} wrote what is no sound {doing} ({error.error_string})", retryable=True) from error
    except OSError as error:
        raise SpeechError(f"no room for a temporary file {doing}: {error.strerror or error}", retryable=True) from error
    return audio[:, 0], sample_rate
