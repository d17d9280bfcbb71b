"""The training domain: torch and local files only. No queue, no S3, no HTTP, no environment."""
