"""The command-line interface `revnets`."""
