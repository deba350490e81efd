"""The verbs of the command line, one a file: HELP, add_flags(parser) and run(**flags), which imports what it calls."""
