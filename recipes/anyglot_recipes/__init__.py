"""Programs that compose the other packages: the `anyglot` command, ingestion of media, demo, evaluations.

Importing this package imports nothing else, so that `anyglot --help` is instant.
"""
