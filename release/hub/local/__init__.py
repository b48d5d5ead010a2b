"""A small Hugging Face Hub for one machine: the routes that the real `huggingface_hub` client uses, over HTTP.

It tests publishing, pulling and verifying with the real client without an account or a network. It keeps blobs by
SHA-256 and one JSON file for each repository; it is not secured for the open internet.
"""
