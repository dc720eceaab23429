"""Run the command `revnets` as `python -m revnets`."""

from revnets.cli.main import main

if __name__ == "__main__":
    main()
