"""The dialects of other services, translated to the API's own routes."""
