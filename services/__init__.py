"""Outbound services: each wraps one outside system and maps its errors to ours."""
