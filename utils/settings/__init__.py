"""Reading and checking settings; `config` puts them together."""
