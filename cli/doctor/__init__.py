"""`main.py doctor`: tests everything that a worker needs before its first job.

A check is a generator that takes the settings and yields findings. `command.CHECKS` lists the
checks; each has a time limit. A check leaves nothing behind and shows no secret.
"""
