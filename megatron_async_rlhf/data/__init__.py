"""From a prompt source to tokenized prompts in a reproducible order. No torch here: the controller imports it."""
