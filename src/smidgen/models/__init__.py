"""Models: found by name, loaded, asked for text. The one room that knows transformers."""
