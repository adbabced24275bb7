"""Metrics on real data, one idea a file: captions, speech, CLIP, CLAP. None knows sources or commands.

`data_eval` beside this package applies them; docs/evaluation.md says what each number means.
"""
