"""Self-contained HTML pages: how runs learned (run_report.py), what a model does (tour.py)."""
