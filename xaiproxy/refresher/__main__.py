"""`python -m xaiproxy.refresher`."""

import sys

from xaiproxy.refresher.command import main

sys.exit(main())
