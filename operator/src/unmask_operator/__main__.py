"""``python -m unmask_operator``: the operator."""

import sys

from unmask_operator.entry import main

__all__: list[str] = []

sys.exit(main())
