"""Results of a style run: probe, samples, report and model files."""
