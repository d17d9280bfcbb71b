"""What a style run shows and returns: probe, samples, report and model files."""
