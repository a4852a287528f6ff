"""The three tasks: how records become tensors, what the loss is, and what is counted."""
