"""Small made files of every kind that people send; nothing here is anybody's image."""
