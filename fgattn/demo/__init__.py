"""One video twice, dense and with FG-Attn, on a small model that ships with the project."""
