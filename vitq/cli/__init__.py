"""The command line: one file a command, joined in app.py; each loads, calls one Python function, saves and prints."""
