"""`anyglot eval data`: a model on real data that nobody graded, measured by the metrics of `anyglot_recipes.metrics`.

items.py reads a source, run.py lets the model answer, evidence.py lets judges look and listen, scores.py and ranking.py
make rows of it, table.py says which metric fits what, report.py writes it down, cli.py is the command.
"""
