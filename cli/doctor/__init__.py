"""`python main.py doctor`: everything that a worker needs, tested before the first job.

Each check stands by itself, ends in time, changes nothing that stays, and shows no secret.
"""
