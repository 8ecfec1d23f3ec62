"""GGUF files, both ways side by side: files, names, configs, tokenizers, types and their blocks."""
