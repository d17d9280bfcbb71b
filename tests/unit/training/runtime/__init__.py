"""Tests of the trainer process, for every kind."""
