"""Orders that are put together on the page."""
