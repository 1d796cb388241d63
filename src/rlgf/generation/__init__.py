"""Sampling of completions: the in-process decoder and OpenAI-compatible servers."""
