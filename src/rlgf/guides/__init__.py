"""Guides: models, servers, people and functions that start or finish completions."""
