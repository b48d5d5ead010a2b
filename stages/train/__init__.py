"""Training of a model by Megatron-core, in any layout of ranks."""
