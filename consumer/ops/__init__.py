"""What ops type: publish, look at, cancel and send back jobs. One module a command."""
