"""A kind of job that is added from outside: one file, one folder of work, one registry line."""
