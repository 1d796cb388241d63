"""Metrics of texts: for files (`rlgf score`, `score.py`) and as rewards (`functions.py`). The scoring is done by libraries."""
