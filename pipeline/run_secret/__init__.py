"""The secret of a run. This folder is on the path of vLLM's processes, so it contains nothing else."""
