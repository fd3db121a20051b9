"""`async-rlhf init`: a first configuration for a model and data, with a comment on every key."""
