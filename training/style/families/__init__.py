"""Base models, one file per family."""
