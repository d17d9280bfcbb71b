"""How fast a language model trains here, compared with plain TRL."""
