"""The code inside vLLM's workers. This folder is on their path, so it holds nothing else."""
