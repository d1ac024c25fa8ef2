"""The state of normalised weights under other names in state dicts. Knows no files."""
