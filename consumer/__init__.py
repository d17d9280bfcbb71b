"""The front desk: a job's life from its message to its ending. Never imports torch."""
