import sys

from prime_fast.cli import main

sys.exit(main())
