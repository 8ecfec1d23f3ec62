"""The arithmetic that methods share: grids, factorizations, the column solver, the refinement."""
