"""Fuzzers of all that reads foreign bytes: whatever they are, the answer is a value or one of quantkit's errors."""
