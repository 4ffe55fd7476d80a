"""Reports as words, pictures and messages."""
