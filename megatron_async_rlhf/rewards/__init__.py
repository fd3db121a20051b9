"""What scores a completion. No torch here: the controller imports it."""
