"""Allocation: which scheme each layer gets so that a file within a budget loses least."""
