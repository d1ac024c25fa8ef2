"""The shell: each command parses, calls what is public, and prints."""
