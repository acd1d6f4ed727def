"""`python -m xaiproxy.login`."""

import sys

from xaiproxy.login.command import main

sys.exit(main())
