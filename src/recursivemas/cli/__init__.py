"""The command line: one file a verb. It reads arguments, calls the library, and prints; nothing is decided here."""
