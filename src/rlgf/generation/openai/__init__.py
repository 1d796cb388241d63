"""OpenAI-compatible servers: client, responses, token ids and cache."""
