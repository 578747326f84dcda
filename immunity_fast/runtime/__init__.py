"""What all wings stand on: the command line, compiling, devices, number formats, processes, files."""
