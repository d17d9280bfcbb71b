"""The API server: order, follow and steer jobs over HTTP (docs/api.md)."""
