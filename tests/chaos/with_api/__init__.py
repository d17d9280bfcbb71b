"""The API server in the suite: its processes, its database, its clients, its faults, its verdict."""
