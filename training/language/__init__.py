"""The language-model kind's training: base, masks, loop, evaluation, export and report."""
