"""Conversations for language models: reading, cleaning and counting, without torch."""
