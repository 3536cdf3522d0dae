"""Compile programs for an H100 and a TPU on a machine that has neither, and count what they do."""
