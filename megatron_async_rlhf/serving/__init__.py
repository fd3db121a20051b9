"""Talking to a model server, whatever it serves: HTTP with time limits, telling silence from work, waiting for a return."""
