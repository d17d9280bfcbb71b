"""Tests of reading and cleaning conversations."""
