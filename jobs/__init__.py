"""What a job is: kinds, messages, records, addresses. Pure: no torch, no network."""
