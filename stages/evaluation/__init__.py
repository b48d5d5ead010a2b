"""What models are worth, and what is compared with what they were trained on. No torch at import."""
