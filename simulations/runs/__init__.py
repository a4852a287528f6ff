"""The runs that lie in a folder: listed, laid side by side, and cleaned of what their results do not need."""
