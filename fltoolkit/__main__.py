"""`python -m fltoolkit`."""

import sys

from fltoolkit.cli import main

sys.exit(main())
