"""Experiments that inform a choice: resumable, each cell's result on the disk as soon as it is there."""
