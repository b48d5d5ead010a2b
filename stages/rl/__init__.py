"""Reinforcement learning: protocols, losses, verifiers, the sandbox, samplers and the loop between them."""
