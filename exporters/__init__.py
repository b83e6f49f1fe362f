"""Writers of the files that other runtimes load."""
