"""Images and captions without torch: decoding, colour, checks, crops."""
