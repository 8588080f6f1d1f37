"""The command `classer`: one file a command."""
