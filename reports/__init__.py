"""The training report as an HTML page."""
