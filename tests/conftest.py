"""Fixtures for all tests: real data where it is there, and torch settings that make results repeatable."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

# Derandomised: the same examples on every run and machine. Slow machines must not fail on time.
settings.register_profile(
    "house", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50
)
settings.load_profile("house")


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in {"", "0", "false"}


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The folder that holds pyproject.toml."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real media, never copied into the project: $ANYGLOT_DATA, or `shared/data` beside or in the repository.

    Tests that need it are skipped where it is missing, except in CI, where missing data must not pass unseen.
    """
    named = os.environ.get("ANYGLOT_DATA")
    candidates = [Path(named)] if named else [ROOT.parent / "shared" / "data", ROOT / "shared" / "data"]
    for folder in candidates:
        if folder.is_dir():
            return folder
    places = " or ".join(map(str, candidates))
    reason = f"no real data at {places}; set ANYGLOT_DATA to the folder that holds real/"
    if _in_ci():
        pytest.fail(reason)
    pytest.skip(reason)


def _end(pid: int, how: signal.Signals) -> None:
    """Ends a process and all below it, the youngest first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [*process.children(recursive=True)[::-1], process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(how)


def _run_ranks(program: Path, *arguments: Path, ranks: int = 2, seconds: int = 300, tries: int = 1) -> None:
    """Runs a program on gloo ranks, or on one without torchrun; fails with what it wrote to stderr.

    Of a program that stands still, every process writes its stack before it is ended. `tries=2` starts it once more
    then, with a warning: seldom one does, and why is not known (a fork of loader workers beside gloo's threads may be,
    as in pytorch issue 75147). Only for programs that write all their files anew.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(program), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    try:
        errors = process.communicate(timeout=seconds)[1][-20000:]
    except subprocess.TimeoutExpired:
        _end(process.pid, signal.SIGABRT)
        errors = process.communicate(timeout=60)[1][-20000:] + f"\n{program.name} stood still for {seconds} s"
        if tries > 1:
            warnings.warn(errors, stacklevel=2)
            return _run_ranks(program, *arguments, ranks=ranks, seconds=seconds, tries=tries - 1)
    finally:
        _end(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    return None


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """`run_ranks(program, *arguments, ranks=2)`: see `_run_ranks`."""
    return _run_ranks


@pytest.fixture(autouse=True)
def _repeatable_torch() -> Iterator[None]:
    """One thread and a fixed seed for each test, whatever ran before it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished dataset of dialogues with real media. Tests that change it copy it first."""
    from anyglot_synth.dialogue import Dialogue, MediaFile, Part, Turn, address
    from anyglot_synth.nanoworld import melody, voices
    from anyglot_synth.nanoworld.draw import draw
    from anyglot_synth.nanoworld.language import describe
    from anyglot_synth.nanoworld.scene import Scene, Thing
    from anyglot_synth.store import Store

    if not voices.installed_voices():
        pytest.skip("no speech engine (flite, espeak-ng) is here")
    store = Store(tmp_path_factory.mktemp("synth") / "dialogues")
    first, second = (voice.name for voice in voices.VOICES[:2])
    scene = Scene((Thing("circle", "red", "small", "top", "left"),))
    engine = {"version": "1", "licence": "CC0-1.0"}

    def speech(text: str, spoken: str, voice: str) -> Part:
        origin = {"backend": "nanoworld-voice", "style": {"voice": voice}, "seed": 0, **engine}
        key = address([text, voice])
        return Part(
            "speech", text, spoken, store.put_sound(key, voices.speak(spoken, voice), voices.SAMPLE_RATE, origin)
        )

    def picture(text: str) -> Part:
        origin = {"backend": {"engine": "nanoworld-picture", "version": 1}, "licence": "CC0-1.0"}
        return Part("image", text, media=store.put_picture(address(text), draw(scene), origin))

    def music(text: str) -> Part:
        key = address(text)
        made: MediaFile = store.put_sound(key, melody.render(scene), 16_000, {"backend": "nanoworld-melody", **engine})
        store.put(key, ".mid", lambda path: melody.write_midi(path, melody.notes(scene)))
        return Part("music", text, media=made)

    def said(*turns: tuple[str, list[Part]], task: str = "chat", source: str = "tests", **more: Any) -> Dialogue:
        return Dialogue(tuple(Turn(role, tuple(parts)) for role, parts in turns), source, "CC-BY-4.0", task, **more)

    hostile = "<script>document.title = 'x'</script> \"quoted\" | **bold** & 'single' 日本語"
    kept = [
        said(
            ("system", [Part("text", "Answer briefly.")]),
            ("user", [speech("What's at no. 2?", "what is at number two", first)]),
            ("assistant", [speech("A red circle.", "a red circle", second)]),
            ("user", [speech("Thanks!", "thanks", first)]),
            ("assistant", [Part("text", "You are welcome.")]),
            task="spoken-chat",
        ),
        said(
            ("user", [picture(describe(scene)), Part("text", "What is this?"), Part("text", hostile)]),
            ("assistant", [Part("text", describe(scene))]),
            task="caption",
            source="a|b `c` <i>",
        ),
        said(
            ("user", [Part("text", "Play the scene.")]),
            ("assistant", [music("a melody of the scene"), picture("the scene"), speech("Here.", "here", second)]),
            task="text->music",
            meta={"scene": scene.to_dict()},
        ),
    ]
    rejected = said(("user", [speech("Xyz?", "thanks", first)]), ("assistant", [Part("text", "Pardon?")]))
    broken = said(("user", [Part("speech", "Never spoken.")]), ("assistant", [Part("text", "Yes.")]))
    samples = [
        {"index": index, **dialogue.to_dict(), "facts": {"wer": [0.0, 0.25 * index], "judge": {"loudness": -21.5}}}
        for index, dialogue in zip((0, 2, 4), kept, strict=True)
    ]
    ends = {"stage": "recognise", "reason": "wer", "detail": f"1.0 > 0.3 {hostile}", "facts": {"wer": [1.0]}}
    rejects = [{"index": 1, "id": rejected.id, **ends, **rejected.to_dict()}]
    errors = [
        {"index": 3, "id": broken.id, "stage": "speak", "reason": "backend", "detail": "no answer", "retryable": True}
        | {"attempts": 3, "facts": {}}
        | broken.to_dict()
    ]
    for name, entries in (("samples", samples), ("rejects", rejects), ("errors", errors)):
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
        (store.folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    recipe = {"name": "small", "source": {"kind": "tests", "api_key": "sesame"}, "stages": ["speak", "recognise"]}
    job = {"format": 1, "recipe": recipe, "fingerprint": address(recipe), "seed": 7, "num": 5}
    (store.folder / "job.json").write_text(json.dumps(job))
    return store.folder
