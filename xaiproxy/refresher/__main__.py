"""`python -m xaiproxy.refresher`."""

import sys

from xaiproxy.refresher.process import main

sys.exit(main())
