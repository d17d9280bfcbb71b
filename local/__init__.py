"""Servers and processes of one machine, for `main.py up`, the demo and the tests."""
