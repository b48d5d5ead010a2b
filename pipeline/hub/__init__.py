"""Access to the Hugging Face Hub: the client with retries, and what a repository contains."""
