"""Commands for operators: publish, list, cancel and redrive jobs."""
