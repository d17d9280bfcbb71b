"""Tests of the API without servers."""
