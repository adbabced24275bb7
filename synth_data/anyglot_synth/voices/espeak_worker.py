"""Speaks one text with the espeak-ng *library* and writes a WAV file; run as a program of its own, never imported.

The library keeps global state (it is not thread-safe, and the wave generator carries phase from one text to
the next), so a fresh process per text is what makes its output a function of the text alone. Only the
standard library is used: the process starts in some 15 ms. It knows nothing of voices, caches or loudness;
`programs.py` calls it.

    python -I -S espeak_worker.py LIBRARY DATA_FOLDER VOICE RATE PITCH TEXT_FILE WAV_FILE
    python -I -S espeak_worker.py LIBRARY DATA_FOLDER --version
    python -I -S espeak_worker.py LIBRARY DATA_FOLDER --voices

`--voices` prints a line per voice and per variant: language tag, gender (f, m or -), name and file, with tabs between.

Exit status: 0 done, 1 with one line on stderr when the library cannot be used. The numbers below are those of
`speak_lib.h` of espeak-ng (https://github.com/espeak-ng/espeak-ng).
"""

from __future__ import annotations

import ctypes
import sys
import wave

AUDIO_OUTPUT_SYNCHRONOUS = 2
INITIALIZE_DONT_EXIT = 0x8000
RATE, PITCH = 1, 3
POS_CHARACTER = 1
CHARS_UTF8 = 1


class _Voice(ctypes.Structure):
    """`espeak_VOICE`."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_void_p),  # a byte of priority, the tag and a zero byte, again and again
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("xx1", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    ]


def _print_voices(library: ctypes.CDLL) -> None:
    library.espeak_ListVoices.restype = ctypes.POINTER(ctypes.POINTER(_Voice))
    for asked in (None, _Voice(languages=ctypes.cast(ctypes.c_char_p(b"variant"), ctypes.c_void_p).value)):
        voices = library.espeak_ListVoices(None if asked is None else ctypes.byref(asked))
        number = 0
        while voices[number]:
            voice = voices[number].contents
            tag = ctypes.string_at(voice.languages + 1) if voice.languages else b""
            fields = (tag, b"-mf"[voice.gender : voice.gender + 1], voice.name or b"", voice.identifier or b"")
            print(*(field.decode() for field in fields), sep="\t")
            number += 1


def main(arguments: list[str]) -> int:
    """Do what the command line asks, return the exit status."""
    library_path, data_path = arguments[:2]
    library = ctypes.CDLL(library_path)
    library.espeak_Info.restype = ctypes.c_char_p
    sample_rate = library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path.encode(), INITIALIZE_DONT_EXIT)
    if sample_rate <= 0:
        print(f"espeak-ng cannot read its data folder {data_path} (result {sample_rate})", file=sys.stderr)
        return 1
    if arguments[2] == "--version":
        print(library.espeak_Info(None).decode())
        return 0
    if arguments[2] == "--voices":
        _print_voices(library)
        return 0

    voice, rate, pitch, text_path, wav_path = arguments[2:]
    pieces: list[bytes] = []

    def collect(samples: ctypes.c_void_p, count: int, events: ctypes.c_void_p) -> int:
        if samples and count > 0:
            pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(collect)
    library.espeak_SetSynthCallback(callback)
    if hasattr(library, "espeak_ng_SetRandSeed"):  # some voices add noise, whose seed is else the time
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        print(f"espeak-ng has no voice {voice!r}", file=sys.stderr)
        return 1
    library.espeak_SetParameter(RATE, int(rate), 0)
    library.espeak_SetParameter(PITCH, int(pitch), 0)
    with open(text_path, "rb") as file:
        text = file.read()
    # The size counts the closing zero byte: a larger one would make the library read past the buffer.
    buffer = ctypes.create_string_buffer(text)
    result = library.espeak_Synth(buffer, len(text) + 1, 0, POS_CHARACTER, 0, CHARS_UTF8, None, None)
    if result != 0 or library.espeak_Synchronize() != 0:
        print(f"espeak-ng could not speak the text (result {result})", file=sys.stderr)
        return 1
    with wave.open(wav_path, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(sample_rate)
        out.writeframes(b"".join(pieces))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
