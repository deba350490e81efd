"""llama.cpp's files (GGUF): a Hugging Face folder made of one, and one made of a folder or an adapter."""
