"""Tests of the training of a style."""
