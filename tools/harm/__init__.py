"""What `tools/chaos.py` does to a run: the run and its starts, the faults, and machines whose network it can spoil."""
