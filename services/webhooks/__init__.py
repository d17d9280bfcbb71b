"""Signed webhooks to the backend, and the meaning of its answers."""
