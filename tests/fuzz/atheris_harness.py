"""The targets of `test_fuzz.py`, driven by coverage for as long as you like: `pip install atheris`, which is no
dependency of this project, then

    python tests/fuzz/atheris_harness.py pictures -max_total_time=600

runs one target; without a target, all of them in turn for 60 seconds each. Further arguments go to libFuzzer. What it
finds lies in `crash-*` or `timeout-*` files of the working folder; run the target with that file to see it again.
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

try:
    import atheris
except ImportError:
    sys.exit("atheris is not installed; run: pip install atheris")

os.environ.setdefault("OMP_NUM_THREADS", "1")
with atheris.instrument_imports(include=["anyglot_tokenizers", "PIL"]):
    import test_fuzz as targets

LIMITS = ["-rss_limit_mb=3000", "-timeout=120", "-max_len=8192"]
FILES = {  # name -> (call on the content of a file, valid files to start from)
    "pictures": (targets.check_picture, targets.pictures),
    "sounds": (targets.check_sound, targets.sounds),
    "code_files": (targets.check_code_file, targets.code_files),
}
DRAWN = {
    name: getattr(targets, f"test_{name}").hypothesis.fuzz_one_input
    for name in (
        *("code_file_headers", "damaged_weights", "damaged_configs", "published_folders"),
        *("unknown_folders", "pickles_are_never_run"),
        *("encode_sound", "encode_in_chunks", "encode_picture", "decode", "streams"),
        *("encode_published", "decode_published"),
    )
}


def main(arguments: list[str]) -> None:
    """Fuzz one target in this process, or all of them, each in a process of its own."""
    names = [name for name in arguments if not name.startswith("-") and name in FILES | DRAWN]
    if not names:
        flags = arguments or ["-max_total_time=60"]
        for name in FILES | DRAWN:
            print(f"== {name}", flush=True)
            if os.spawnv(os.P_WAIT, sys.executable, [sys.executable, __file__, name, *flags]):
                sys.exit(f"{name} found something")
        return
    name = names[0]
    rest = [argument for argument in arguments if argument != name]
    with TemporaryDirectory() as corpus:
        if name in FILES:
            call, valid = FILES[name]
            for number, content in enumerate(valid()):
                (Path(corpus) / f"{name}-{number}").write_bytes(content)
        else:
            call = DRAWN[name]
        targets.code_files()  # imports and builds all that is needed, or the first call would seem to hang
        given = [argument for argument in rest if not argument.startswith("-")]
        atheris.Setup([sys.argv[0], *LIMITS, *rest, *([] if given else [corpus])], call)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
