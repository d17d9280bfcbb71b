"""The API server in the suite: processes, database, clients, faults and verdict."""
