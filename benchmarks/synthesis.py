"""What the synthesis pipeline costs on top of its engine: spoken dialogues with flite.

Bare calls of the engine, one after the other, against `anyglot_synth.run` with the same texts, voices and styles: the
pipeline also splits long texts, resamples, makes all equally loud, writes FLAC, hashes, keeps a journal and writes the
lists, the report and the card. Then two workers against one, and a finished job run again. Every run is a process of
its own, start included, in a fresh folder. Last, the most memory of the process that leads, for 1,000 and 20,000
dialogues without sound. Peer: the engine itself.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from anyglot_synth.dialogue import Dialogue, Part, Turn
from anyglot_synth.run import run
from anyglot_synth.sources import Source
from anyglot_synth.speak import SpeakStage
from anyglot_synth.stages import Item, Stage
from anyglot_synth.store import Store
from anyglot_synth.voices import backend

THINGS = [
    *("river", "garden", "winter", "market", "engine", "teacher", "letter", "window"),
    *("forest", "island", "music", "silver", "morning", "village", "doctor"),
]
WAYS = [
    "Tell me how a {} and a {} are alike.",
    "Why would anyone bring a {} to a {}?",
    "I like the {} more than the {}, and you?",
]
ENGINE = {"engine": "flite", "voices": ["slt", "rms"]}


class Sentences(Source):
    """Questions and answers of two words each, no two alike."""

    name = "sentences"

    def __init__(self, num: int, spoken: bool) -> None:
        self.num, self.modality = num, "speech" if spoken else "text"

    def config(self) -> dict[str, Any]:
        return {"spoken": self.modality}

    def read(self, store: Store) -> Iterator[Dialogue]:
        for i in range(self.num):
            a, b = THINGS[i % len(THINGS)], THINGS[i // len(THINGS) % len(THINGS)]
            asked = f"{WAYS[i % len(WAYS)].format(a, b)} Number {i}."
            turns = (
                Turn("user", (Part(self.modality, asked),)),
                Turn("assistant", (Part(self.modality, f"It is {i}."),)),
            )
            yield Dialogue(turns, "sentences", "CC0-1.0")


class Nothing(Stage):
    """Passes items on."""

    name = "nothing"

    def config(self) -> dict[str, Any]:
        return {}

    def run(self, item: Item, store: Store) -> Item:
        return item


def stage() -> SpeakStage:
    return SpeakStage([ENGINE], {"assistant": "slt", "users": ["rms"], "rate": [1.0, 1.0], "pitch": [0.0, 0.0]})


def leg(kind: str, num: int, out: str) -> dict[str, float]:
    """One side, in this process: its seconds and its most memory in MiB."""
    began = time.perf_counter()
    if kind == "bare":
        engine = backend(**ENGINE)
        engine.setup()
        for dialogue in Sentences(num, True).read(Store(out)):
            for turn, voice in zip(dialogue.turns, ("rms", "slt"), strict=True):
                made = engine.make(turn.parts[0].text, {"voice": voice, "rate": 1.0, "pitch": 0.0}, 0)
                assert np.abs(made.array).max() > 0.01
    elif kind == "memory":
        run(Sentences(num, False), [Nothing()], out, workers=1)
    else:
        done = run(Sentences(num, True), [stage()], out, workers=int(kind))
        assert done.ok == num
    return {"seconds": time.perf_counter() - began, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def apart(kind: str, num: int, out: Path) -> dict[str, float]:
    """`leg` in a process of its own; seconds are those of the whole process."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, "--leg", kind, "--num", str(num), "--out", str(out)],
                          check=True, capture_output=True, text=True)  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found | {"whole": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=500, help="dialogues of two utterances")
    parser.add_argument("--many", type=int, default=20_000, help="dialogues of the memory leg")
    parser.add_argument("--leg", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.leg:
        print(json.dumps(leg(arguments.leg, arguments.num, arguments.out)))
        return
    with tempfile.TemporaryDirectory() as folder:
        place, num = Path(folder), arguments.num
        bare = apart("bare", num, place / "bare")["whole"]
        one = apart("1", num, place / "one")["whole"]
        two = apart("2", num, place / "two")["whole"]
        again = apart("2", num, place / "two")["whole"]
        samples = [(place / name / "samples.jsonl").read_bytes() for name in ("one", "two")]
        assert samples[0] == samples[1], "the number of workers changed the result"
        print(
            f"{num} dialogues of 2 utterances: bare engine {bare:.1f} s, 1 worker {one:.1f} s, 2 workers {two:.1f} s, "
            f"run again {again:.2f} s"
        )
        few = apart("memory", 1000, place / "few")["mib"]
        many = apart("memory", arguments.many, place / "many")["mib"]
        print(
            f"memory of the leading process: {few:.0f} MiB for 1,000 dialogues, {many:.0f} MiB for {arguments.many:,}"
        )
    ratios = {
        "time of 1 worker over bare engine calls (less is better)": round(one / bare, 3),
        "2 workers over 1": round(one / two, 2),
        "run again over whole time (less is better)": round(again / two, 4),
        "memory for 20 times as many (1 is best)": round(many / few, 3),
    }
    print(
        json.dumps(
            {"benchmark": "synthesis", "ratios": ratios, "versions": {"flite": backend(**ENGINE).identity()["version"]}}
        )
    )


if __name__ == "__main__":
    main()
