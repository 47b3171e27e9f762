"""One transformation a file, batch in, batch out. No ray, no file system."""
