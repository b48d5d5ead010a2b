"""Access to the Hugging Face Hub: the client with limits and retries, and what a repository contains."""
