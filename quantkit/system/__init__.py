"""Processes, files, locks and what else is about the machine, not about models."""
