"""Datasets, files, text, tokens, conversations and preference pairs."""
