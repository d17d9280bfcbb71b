"""Leaves of the house: errors, events, logging, GPU readings. Imports nothing of ours."""
