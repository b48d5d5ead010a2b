"""Publishes a release to the Hugging Face Hub and downloads it again; `local` is a Hub for tests."""
