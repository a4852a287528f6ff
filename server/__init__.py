"""The coordinator: the round loop, what it stores, and how it combines what sites send."""
