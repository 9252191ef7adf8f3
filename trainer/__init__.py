"""Peers, methods, the step, and the run that they make."""
