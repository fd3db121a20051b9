"""How often those who wait for each other hear that all is well; the timeouts of the configuration are checked against it."""

IDLE_BEAT_S = 5.0  # learner rank 0, by the ranks that wait inside a collective for its next command
NODE_BEAT_S = 1.0  # machines of a run, by each other
