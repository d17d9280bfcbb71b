"""The trainer process as the worker sees it, and the machine that it runs on."""
