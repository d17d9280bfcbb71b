"""Errors, events, logging, GPU readings and other leaves: imports no other package."""
