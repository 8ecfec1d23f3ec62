"""The public functions. Each is what a command of the command line does."""
