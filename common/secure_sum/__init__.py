"""The secure sum `secsum/1`: the coordinator learns the sum over enough sites and nothing else."""
