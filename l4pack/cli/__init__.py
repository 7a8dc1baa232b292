"""The command line: one file a command, each parses its arguments and calls one library function."""
