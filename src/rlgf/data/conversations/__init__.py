"""Conversations: messages, and the chat templates that render them."""
