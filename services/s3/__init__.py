"""S3: inputs, checkpoints, models and job records."""
