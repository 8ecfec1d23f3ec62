"""The engine: a checkpoint streams by, block by block, and every layer is solved as it passes."""
