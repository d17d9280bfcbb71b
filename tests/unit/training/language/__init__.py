"""Tests of the language-model kind's training."""
