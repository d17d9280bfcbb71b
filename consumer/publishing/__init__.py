"""Publishing a finished model to its folder on S3, and rolling back."""
