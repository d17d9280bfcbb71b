"""Tests of the base models of styles."""
