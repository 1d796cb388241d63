"""Measurements of rlgf against its peers; see bench/README.md."""
