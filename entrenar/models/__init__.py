"""The models served: what they are (`spec`, `arch`), how they are built, loaded and saved."""
