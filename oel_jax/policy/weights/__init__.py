"""Weights in and out: Hugging Face folders, GGUF files, files of our own."""
