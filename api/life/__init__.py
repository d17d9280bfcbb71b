"""The life of a job in the API: its order, its news, cancel and pause, and its restoration."""
