"""``python -m searchmerge``: the command line where the script is not on the path."""

from searchmerge.cli import main

if __name__ == "__main__":  # and not where a process that it starts imports it
    main()
