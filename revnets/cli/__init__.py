"""The command line: `revnets COMMAND`, and the commands of this package."""
