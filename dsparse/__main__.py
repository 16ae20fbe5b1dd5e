"""`python -m dsparse`."""

import sys

from dsparse.cli import main

sys.exit(main())
