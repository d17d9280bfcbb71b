"""Numbers that the workers and the suite must agree in."""

QUEUE = "model_training"
DEAD_QUEUE = f"{QUEUE}.dead"
STYLE, LLM = "style", "llm"
QUEUES = {STYLE: QUEUE, LLM: f"{QUEUE}.llm"}
"""The training queue of each kind of job."""
LLM_BASE = "stand-in/none"
LLM_FILES = (
    *("training_report.json", "training_report.html", "README.md", "chat_template.jinja"),
    *("fingerprint.json", "adapter_config.json", "adapter_model.safetensors"),
)
"""The files of a language model, in the order of their publication."""
MEDIA, STATE = "media", "state"
RETRY_DELAYS = (0.5, 1.0, 2.0)
ENDING_DELAYS = (1.0, 2.0, 4.0)
RETRY_AFTER = 4
"""Seconds that a backend asks for: longer than an ending is tried at once."""
WINDOW_SECONDS = 15.0
"""`DEDUPLICATION_WINDOW_SECONDS`: longer than any outage of the suite, so that a message that comes
back late is never an order of its own."""
ATTEMPTS_TO_SPARE = 2
"""No fault is aimed at jobs while one of them has fewer: one that is under way may cost it
another."""
CHECKPOINT_INTERVAL = 2
GRACE_SECONDS = 4.0
"""`SHUTDOWN_GRACE_SECONDS` where the platform kills after 5 s."""
LONGEST_FREEZE_IN_LEASES = 5.0
ACK_TIMEOUT_MS = 5000
IDLE_SECONDS = 20.0
"""`--idle-seconds` of the worker that runs with `--once`."""
MAX_JOB_BYTES = 50_000_000
