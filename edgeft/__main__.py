"""Run the command line as `python -m edgeft`."""

from edgeft.cli import main

raise SystemExit(main())
