"""The Hugging Face Hub: the client, uploads and downloads of releases, and a local Hub for tests and practice."""
