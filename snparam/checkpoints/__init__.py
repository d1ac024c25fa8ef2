"""The state of normalised weights under other keys of state dicts; nothing here opens a file."""
