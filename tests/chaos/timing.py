"""Numbers that the workers and the suite must agree in."""

QUEUE = "model_training"
DEAD_QUEUE = f"{QUEUE}.dead"
MEDIA, STATE = "media", "state"
RETRY_DELAYS = (0.5, 1.0, 2.0)
ENDING_DELAYS = (1.0, 2.0)
MAX_ATTEMPTS = 8
ATTEMPTS_TO_SPARE = 4
"""No fault is aimed at jobs while one of them has fewer: some that are under way may still cost it
one each."""
CHECKPOINT_INTERVAL = 2
GRACE_SECONDS = 4.0
"""`SHUTDOWN_GRACE_SECONDS` where the platform kills after 5 s."""
LONGEST_FREEZE_IN_LEASES = 5.0
ACK_TIMEOUT_MS = 5000
