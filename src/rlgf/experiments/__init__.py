"""Comparisons of several runs: variants, tables, figures, reports."""
