"""Readers of the forms data comes in, each giving the same stream of rows: see `anyglot_recipes.manifest`."""
