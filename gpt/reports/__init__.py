"""HTML pages: how runs learned (run_report.py), and what a model does with a prompt (tour.py).

Each page is one self-contained file, without network or server. Its numbers come from the logs of
the runs and from the model's own forward pass.
"""
