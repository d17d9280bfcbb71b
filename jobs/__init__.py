"""The domain of jobs: kinds, messages, records, addresses. Pure: no torch, no network."""
