"""Files that others wrote, and files that we write: the one place where bytes from elsewhere become values.

Reading takes regular files only, up to a limit, runs nothing that a file names, and refuses with `FileError`. What is
written is whole or not there. SECURITY.md says what this promises.
"""
