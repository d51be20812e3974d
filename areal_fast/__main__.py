"""`python -m areal_fast`: the command line of AReaL's data proxy, see cli.py."""

import sys

from areal_fast.cli import main

sys.exit(main())
