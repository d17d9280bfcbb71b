"""Tests of the results of a style: export, samples, measurements and the report."""
