"""Training a style: a LoRA on an image model."""
