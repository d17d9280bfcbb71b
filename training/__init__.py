"""The training domain: torch and local files only. No queue, no S3, no HTTP, no environment."""

from training.runtime.quantisers import keep_out

keep_out()  # before any module here imports PEFT, or diffusers, which imports it
