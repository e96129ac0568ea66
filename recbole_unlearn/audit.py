"""Old place of `storage.audit`, for one version: operators' scripts call ``python -m recbole_unlearn.audit verify``."""

import sys

from recbole_unlearn.storage.audit import *  # noqa: F403
from recbole_unlearn.storage.audit import main

if __name__ == "__main__":
    print("recbole_unlearn.audit moves: call recbole_unlearn.storage.audit", file=sys.stderr)
    sys.exit(main())
