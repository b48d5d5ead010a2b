"""What models are worth, and what is compared with what they were trained on. No torch at import."""

MODEL_LIBRARIES = ("torch", "transformers.modeling_layers", "transformers.tokenization_utils_tokenizers")
"""Modules that a stage imports to load a model, which take seconds."""
