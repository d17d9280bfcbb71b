"""The threads of the API: publication, reconciliation, and news for open streams."""
