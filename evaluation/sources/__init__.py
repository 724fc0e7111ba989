"""The videos that a command line names: files, folders, patterns, addresses, cameras, standard input."""
