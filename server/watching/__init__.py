"""Looking at runs from outside: a page that follows one, and events for other tools. Nothing here changes a run."""
