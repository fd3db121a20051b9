"""`async-rlhf compare`: asynchronous against synchronous runs of one configuration, and whether asynchronous pays."""
