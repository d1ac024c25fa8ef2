"""The commands of `python -m snparam`: each parses arguments, calls the library, and prints."""
