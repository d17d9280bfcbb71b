"""`main.py train`: training on this machine, without other servers."""
