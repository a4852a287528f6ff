"""How the coordinator combines what the sites send: one file for each method."""
