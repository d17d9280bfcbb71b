"""The trainer process: child loop, checkpoints, device. Common to all kinds of job."""
