"""The code inside vLLM's workers. This folder is on their path, so it contains nothing else.

`atom_engine-1.0.dist-info` has vLLM find the engine as it finds an installed plugin.
"""
