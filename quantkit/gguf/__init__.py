"""GGUF files, reading and writing side by side: head, names, tokenizer, tensors, blocks."""
