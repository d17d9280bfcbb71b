"""Worker state for the status pages and the metrics."""
