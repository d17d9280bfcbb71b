"""Tools for those who maintain this project; nothing here runs in production."""
