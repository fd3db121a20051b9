"""What a run will need and how fast it may be, computed from its config and the model's shape. No torch, no GPU."""
