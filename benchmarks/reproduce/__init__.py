"""The paper reproduced: grids of runs, where they run, and the report that puts ours beside its numbers."""
