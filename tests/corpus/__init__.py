"""Small generated files of every kind that users send; none of them is a real image."""
