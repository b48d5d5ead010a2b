"""The code inside vLLM's workers. This folder is on their path, so it contains nothing else."""
