"""The steps of a job's life: inputs, progress, checkpoints, ending, sweep."""
