"""How fast a language model trains here, beside plain TRL."""
