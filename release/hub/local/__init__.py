"""A small Hugging Face Hub for one machine: the routes that the real `huggingface_hub` client uses, over HTTP.

It exists so that publishing, pulling back and verifying can be exercised with the real client where there is no
account and no network. It keeps blobs by SHA-256 and one JSON file a repository; it is not meant for the open internet.
"""
