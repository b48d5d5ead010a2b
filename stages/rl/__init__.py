"""Reinforcement learning: contracts, losses, verifiers, the sandbox, samplers and the loop between them."""
