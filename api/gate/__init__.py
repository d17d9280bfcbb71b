"""The gate before every route: keys, limits, clean input, repetitions, problems, pages."""
