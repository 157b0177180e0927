"""``python -m entrenar.cli``, the same as the ``entrenar`` program."""

import sys

from entrenar.cli import main

sys.exit(main())
