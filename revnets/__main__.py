"""`python -m revnets` is the command `revnets`."""

from revnets.cli.main import main

if __name__ == "__main__":
    main()
