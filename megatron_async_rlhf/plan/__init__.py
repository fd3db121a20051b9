"""`async-rlhf plan`: which layouts of learner and generators a task should have on so many devices, and what to expect of them."""
