"""Traces and error reports, sent if they are configured."""
